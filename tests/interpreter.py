"""Makes Triton's interpreter fast enough for the test suite."""

import triton.language as tl


def patch_once() -> None:
    """Makes device functions use the patched `triton.language` of their kernel's launch.

    The interpreter patches `triton.language` for every call of one `triton.jit` function by another, which takes most
    of its time, although the launch has patched it already. The further patches that functions of `triton.language`
    itself need are made once and kept.
    """
    from triton.runtime.interpreter import InterpretedFunction

    original = InterpretedFunction.__call__
    patched: set[int] = set()

    def call(self, *args, **kwargs):
        names = self.fn.__globals__
        if id(names) not in patched and tl not in names.values():
            patched.add(id(names))
            return original(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    InterpretedFunction.__call__ = call

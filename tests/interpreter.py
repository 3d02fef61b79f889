"""Makes Triton's interpreter fast enough for the tests."""

import triton.language as tl


def patch_once() -> None:
    """Lets a function called by a kernel use the patched language of the kernel's launch.

    The interpreter patches the language anew for every call of a `triton.jit` function from another, which takes most
    of its time. The patches that a launch makes are in place then; what functions of `triton.language` itself need
    besides (patches of `triton.language.core`) stays once it is made.
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

"""Mutants of the package itself: its public names, and the warning about a source tree that hides an installation."""

from . import Mutant

_PACKAGE = "minilm_kernels/__init__.py"
_TREE = "minilm_kernels/_source_tree.py"
_TESTS = "tests/test_package.py"
_SHADOW = "tests/test_package.py -k SourceTree"

MUTANTS = [
    Mutant(
        _PACKAGE,
        "return sorted(__all__)",
        "return sorted({*globals(), *__all__})",
        _TESTS,
        "completion offers private names and modules of the standard library",
    ),
    Mutant(
        _PACKAGE,
        'if "torch" in sys.modules:\n    import_module(".losses", __name__)\n',
        "",
        _TESTS,
        "torch.export.load does not know the operators after importing the package",
    ),
    Mutant(
        _PACKAGE,
        'if (_root / "pyproject.toml").is_file():',
        "if False:",
        _SHADOW,
        "a source tree hides an installation without a warning",
    ),
    Mutant(
        _TREE,
        "installed is not None and installed != root",
        "installed is not None",
        _SHADOW,
        "an editable installation warns about itself",
    ),
    Mutant(
        _TREE,
        '.removeprefix("file://"))).resolve()',
        '.removeprefix("file://")))',
        _SHADOW,
        "an editable installation through a link warns about itself",
    ),
    Mutant(
        _TREE,
        'Path(unquote(found["url"]',
        'Path(str(found["url"]',
        _SHADOW,
        "an editable installation in a folder with a space warns about itself",
    ),
    Mutant(
        _TREE,
        "if root in (Path(entry).resolve() for entry in asked_for if entry):",
        "if root in (Path(entry).resolve() for entry in asked_for):",
        _SHADOW,
        "an empty PYTHONPATH counts as the current folder, and no warning appears",
    ),
]

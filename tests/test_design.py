"""Compares docs/design.md and docs/environment.md with the tree: paths, direction of imports, environment variables."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DESIGN = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")

# The floors, from the lowest to the highest. A module may import modules of its own floor and of lower floors.
FLOORS = [
    ("_choices", "_extras", "_source_tree", "presets"),
    ("_module_view", "_wrappers", "_full_attention", "_architectures"),
    ("relation",),
    ("losses", "packed"),
    ("qkv", "recording"),
    ("students", "vocabulary"),
    ("integrations",),
    ("distill",),
    ("evaluate",),
    ("examples",),
    ("benchmarks",),
]
IMPLEMENTATIONS = "minilm_kernels.relation.backends."


def modules() -> dict[str, Path]:
    """Every module of the package, the examples and the benchmarks, by its dotted name."""
    paths = [path for top in ("minilm_kernels", "examples", "benchmarks") for path in (ROOT / top).rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imported(name: str, path: Path) -> Iterator[str]:
    """Dotted names that a module imports from the project, imports inside functions included."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def floor(name: str) -> int | None:
    """Number of a module's floor; None for the package itself and for other projects."""
    place = name.removeprefix("minilm_kernels.").split(".")[0]
    return next((number for number, names in enumerate(FLOORS) if place in names), None)


def implementation(name: str) -> str | None:
    """The backend that a module belongs to: its file or folder below relation/backends."""
    return name.removeprefix(IMPLEMENTATIONS).split(".")[0] if name.startswith(IMPLEMENTATIONS) else None


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_run_downwards(name):
    mine = floor(name)
    if mine is None:
        assert name in ("minilm_kernels", "minilm_kernels.__main__"), f"{name} stands on no floor: add it to FLOORS"
        return
    for other in imported(name, modules()[name]):
        theirs = floor(other)
        assert theirs is None or theirs <= mine, f"{name} imports {other} from a floor above"


def test_backends_do_not_import_one_another():
    shared = {"cuda_compiler", "cuda_cache", "cuda_loader", None}
    for name, path in modules().items():
        for other in imported(name, path):
            pair = {implementation(name), implementation(other)}
            assert len(pair - shared) < 2, f"{name} imports {other}"


def tree() -> Iterator[str]:
    """Paths of the layout in docs/design.md: indentation is depth, and a line may name several entries."""
    block = re.search(r"## Layout\n\n```text\n(.*?)```", DESIGN, re.DOTALL)
    assert block
    folders: list[str] = []
    for line in block[1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = re.findall(r"\S+", re.split(r"\s{3,}", line.strip())[0])
        folders[depth:] = [names[0].rstrip("/")]
        parent = "/".join(folders[:depth])
        yield from (f"{parent}/{entry.rstrip('/')}".lstrip("/") for entry in names)


@pytest.mark.parametrize("path", sorted(tree()))
def test_layout_exists(path):
    assert (ROOT / path).exists()


def test_files_of_the_ten_changes_exist():
    table = DESIGN.partition("## Ten changes")[2].partition("\n## ")[0]
    files = re.findall(r"\| `([^`]+)` \|$", table, re.MULTILINE)
    assert len(files) == 10
    assert all((ROOT / file).is_file() for file in files), files


def test_every_environment_variable_is_documented():
    documented = set(re.findall(r"`([A-Z_]+)`", (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")))
    folders = ("minilm_kernels", "benchmarks", "build_support", "examples", "tests")
    sources = [path.read_text(encoding="utf-8") for folder in folders for path in (ROOT / folder).rglob("*.py")]
    own = {name for text in sources for name in re.findall(r"\bMINILM_KERNELS_[A-Z_]+\b", text)}
    read = r"(?:environ\.(?:get|setdefault)\(|environ\[|getenv\()\"([A-Z_]+)\""
    others = {name for text in sources for name in re.findall(read, text)}
    hidden = {"PYTHONPATH", "PYTEST_XDIST_WORKER", "MASTER_ADDR", "MASTER_PORT", "PATH", "HOME"}
    assert own | others <= documented | hidden
    assert {name for name in documented if name.startswith("MINILM_KERNELS_")} <= own

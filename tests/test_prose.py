"""Checks the language of the tree: openings of comments, docstrings, headings and paragraphs, and retired names."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("minilm_kernels", "csrc", "build_support", "benchmarks", "examples", "tests", "docs", ".ci", ".github")
SUFFIXES = {".py", ".md", ".toml", ".yml", ".yaml", ".cpp", ".c", ".h", ".cuh", ".cu", ".inl", ".cff"}
CXX = {".cpp", ".c", ".h", ".cuh", ".cu", ".inl"}

# A text that opens with one of these words makes its reader wait for the subject.
OPENING = re.compile(r"[\W_]*(of|what|who|whom|whose|how|where|why|whether|that which)\b", re.IGNORECASE)

# Names that the project no longer uses, as patterns, and the names that replaced them.
RETIRED = {
    r"\bavailable_backends\b": "backend_status",
    r"\brelations_kl\b": "relation_kl_multi",
    r"\bunreached_parameters\b": "unused_parameters",
    r"\bgradient_slots\b": "grad_buffers",
    r"\brows_gradient\b": "backward_none",
    r"\brefusals\(": "unsupported_reasons(",
    r"\bunavailable\(\)": "unavailable_reason()",
    r"\bclass Problem\b|\bproblem\.Backend\b": "RelationInputs, inputs.Backend",
    r"\bmask\.(real|leading|gathered|visible)\b": "Mask.valid, token_shape, unpad(), dense()",
    r"\btwice_even\b": "dup_even",
    r"\bload_matrices\b": "ldmatrix_x4",
    r"\btranspose_matrix\b": "movmatrix",
    r"\bsync_block\b": "syncthreads",
    r"\bshared_per_processor\b": "smem_per_sm",
    r"\bkNothing\b": "kNegInf",
    r"\b(triton_backend|triton_kernels|triton_table)\.py\b": "backends/triton/*.py",
    r"\bclass Processes\b": "DistContext",
    r"--lr\b": "--learning-rate",
    r"--clip\b": "--max-grad-norm",
    r"--accumulation\b": "--gradient-accumulation-steps",
    r"--eval-every\b": "--eval-steps",
    r"--checkpoint-every\b": "--save-steps",
    r"--log-every\b": "--logging-steps",
    r"--keep-checkpoints\b": "--save-total-limit",
    r"--resume(?![-\w])": "--resume-from-checkpoint",
    r"--text-field\b": "--text-column",
    r"\bheldout|--heldout|\bheld-out\b": "eval",
    r"\bcpu_steps\b": "ablation",
    r"--cap\b": "--timeout",
    r"--together\b": "--interleave",
    r"\bfaster than eager\b": "speedup",
    r"\| of the gradient\b|\berror of the gradient\b": "grad error",
}


def files() -> list[Path]:
    """All text files of the project, without generated folders."""
    found = [path for path in ROOT.iterdir() if path.is_file() and (path.suffix in SUFFIXES or path.name == "Makefile")]
    for folder in FOLDERS:
        found += [path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix in SUFFIXES]
    return sorted(path for path in found if path != Path(__file__).resolve())


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Line number and text of every comment, docstring paragraph, heading and paragraph of a file."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        yield from python_comments(source)
        yield from docstrings(source)
    elif path.suffix == ".md":
        yield from markdown(source)
    elif path.suffix in CXX:
        yield from cxx_comments(source)
    else:
        yield from hash_comments(source)


def blocks(comments: list[tuple[int, int, str, bool]]) -> Iterator[tuple[int, str]]:
    """One entry for a run of comments in one column, from (line, column, text, alone on its line)."""
    before = None
    for line, column, text, alone in comments:
        if not (alone and before == (line - 1, column)):
            yield line, text
        before = (line, column) if alone else None


def python_comments(source: str) -> Iterator[tuple[int, str]]:
    found = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = not token.line[: token.start[1]].strip()
            found.append((token.start[0], token.start[1], token.string.lstrip("#! "), alone))
    yield from blocks(found)


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Paragraphs of every string that stands alone: docstrings of modules, classes, functions and attributes."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            for offset, text in paragraphs(node.value.value.splitlines()):
                yield node.lineno + offset, text


def paragraphs(lines: list[str]) -> Iterator[tuple[int, str]]:
    """Index and first line of every paragraph."""
    for index, line in enumerate(lines):
        if line.strip() and (index == 0 or not lines[index - 1].strip()):
            yield index, line.strip()


def markdown(source: str) -> Iterator[tuple[int, str]]:
    """Headings, paragraphs and list items; code, tables and HTML are left out."""
    fence = False
    before = ""
    for number, line in enumerate(source.splitlines(), 1):
        text = line.strip()
        if text.startswith(("```", "~~~")):
            fence = not fence
        elif not fence and not line.startswith("    ") and not text.startswith(("|", "<", "![")):
            begins = text.startswith(("#", "- ", "* ", "> ", "!!!")) or re.match(r"\d+\. ", text)
            if begins or (text and not before):
                yield number, re.sub(r"^(#+|[-*>]|\d+\.|!!! \w+)\s*", "", text)
        before = "" if text.startswith("#") else text


def cxx_comments(source: str) -> Iterator[tuple[int, str]]:
    """Comments of C and C++, runs of `//` lines as one; strings and characters are skipped."""
    pattern = re.compile(r'"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|//[^\n]*|/\*.*?\*/', re.DOTALL)
    found = []
    for match in pattern.finditer(source):
        text = match.group()
        if text.startswith(("//", "/*")):
            line = source.count("\n", 0, match.start()) + 1
            start = source.rfind("\n", 0, match.start()) + 1
            alone = not source[start : match.start()].strip()
            found.append((line, match.start() - start, text.lstrip("/*! \n"), alone and text.startswith("//")))
    yield from blocks(found)


def hash_comments(source: str) -> Iterator[tuple[int, str]]:
    """Comment lines of Makefiles, TOML and YAML, and the help behind a Makefile's targets."""
    lines = source.splitlines()
    yield from blocks(
        [(n, 0, line.lstrip("# "), True) for n, line in enumerate(lines, 1) if line.lstrip().startswith("#")]
    )
    yield from ((n, line.partition(" ## ")[2]) for n, line in enumerate(lines, 1) if " ## " in line)


def openings() -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line}: {text[:100]}"
        for path in files()
        for line, text in texts(path)
        if OPENING.match(text)
    ]


def retired() -> list[str]:
    names = {re.compile(old): new for old, new in RETIRED.items()}
    return [
        f"{path.relative_to(ROOT)}:{number}: {match.group()} (now: {new})"
        for path in files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for old, new in names.items()
        if (match := old.search(line))
    ]


def test_texts_open_with_their_subject():
    found = openings()
    assert not found, f"{len(found)} texts open with of, what, who, how, where, why or whether:\n" + "\n".join(found)


def test_retired_names_are_gone():
    found = retired()
    assert not found, f"{len(found)} lines have a retired name:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("suffix", "source", "expected"),
    [
        (".py", "x = 1  # of all\n# Where it is\n# What follows\n", [(1, "of all"), (2, "Where it is")]),
        (".py", 'def f():\n    """How to."""\n    x = "# what"\n', [(2, "How to.")]),
        (".py", 'class C:\n    """A class.\n\n    What it does.\n    """\n', [(4, "What it does.")]),
        (".cpp", '// Who calls.\n// What else.\nint x = 1;  /* of all */ char* s = "// how";\n', None),
        (".md", "# How to\n\nText.\nWhere it goes on.\n\n```\nWhat\n```\n\n| Of | a |\n\n- of a list\n", None),
        (".toml", "# Why\n# how\nx = 1\n", [(1, "Why")]),
    ],
)
def test_the_scan_finds_openings(tmp_path, suffix, source, expected):
    expected = (
        expected
        or {
            ".cpp": [(1, "Who calls."), (3, "of all */")],
            ".md": [(1, "How to"), (12, "of a list")],
        }[suffix]
    )
    path = tmp_path / f"file{suffix}"
    path.write_text(source, encoding="utf-8")
    assert [(line, text) for line, text in texts(path) if OPENING.match(text)] == expected


if __name__ == "__main__":
    print(*openings(), *retired(), sep="\n")

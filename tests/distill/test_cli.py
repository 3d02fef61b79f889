"""The command line: messages and exit statuses for valid, invalid and hostile arguments, without tracebacks."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minilm_kernels.distill import DistillConfig, loop
from minilm_kernels.distill.cli import main
from minilm_kernels.distill.config_file import LARGEST_FILE

REQUIRED = ["--teacher", "no/such/teacher", "--copy-layers", "1", "--text", "no-such-text"]
SECONDS = 600  # time limit of a command on a busy machine
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command line in an empty folder. Returns its status and its standard error."""
    monkeypatch.chdir(tmp_path)

    def go(*words: str) -> tuple[int, str]:
        try:
            status = main(words)
        except SystemExit as end:
            status = int(end.code or 0)
        return status, capsys.readouterr().err

    return go


def _interpreter(code: str, *words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False, **more)


# --- options


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--learning-rate"], "argument --learning-rate: expected one argument"),
        (["--text"], "argument --text: expected at least one argument"),
        (["--packing=1"], "--packing"),
        (["--student-l", "3"], "unknown option '--student-l'; did you mean --student or --student-layer or"),
        (["--warmup=3"], "unknown option '--warmup'; did you mean --warmup-steps?"),
        (["stray"], "unknown option 'stray'"),
        (["--text", "a", "--", "--learning-rate"], "unknown option"),
    ],
)
def test_wrong_usage_leads_with_the_error_and_ends_with_the_way_to_help(run: Run, words: list[str], said: str) -> None:
    status, error = run(*words)
    first, last = error.splitlines()
    assert status == 2
    assert first.startswith("minilm-distill: error: ")
    assert said in first
    assert last == "minilm-distill --help lists the options"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--learning-rate", "inf"], "--learning-rate: expected a finite number, got inf"),
        (["--relations", "qq:nan"], "--relations: expected a finite number, got nan"),
        (["--backend", "cudda"], "--backend must be one of auto, cuda, triton, cpu, torch, reference, got 'cudda'"),
        (["--output-dir", ""], "--output-dir: expected a name, got ''"),
        (["--seed", "1" * 5000], "--seed: expected a whole number, got '111"),
        (["--config", ""], "--config: expected a name, got ''"),
        (["--config", "x" * 5000], "--config 'xxx"),
        (["--config", "\0"], "--config"),
        (["--config", "."], "--config: there is no file ."),
        (["--config", os.devnull], f"--config: there is no file {os.devnull}"),
    ],
)
def test_a_wrong_value_is_one_line(run: Run, words: list[str], said: str) -> None:
    status, error = run("--output-dir", "o", *REQUIRED, *words)
    assert status == 2
    assert said in error
    assert error.startswith("minilm-distill: error: ")
    assert len(error.splitlines()) == 1
    assert not list(Path().iterdir())


def test_version_names_package_and_torch(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from minilm_kernels import __version__

    assert main(["--version"]) == 0
    found = capsys.readouterr().out
    assert found.startswith(f"minilm-distill {__version__}, torch ")
    assert torch.__version__.startswith(found.split()[-1])  # the package may leave out "+cu130"


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["--recipe", "list"],
        ["--recipe", "x"],
        ["--learning-rate", "nan"],
        ["--nonsense"],
        [],
    ],
)
def test_options_are_checked_before_torch_is_imported(words: list[str], tmp_path: Path) -> None:
    code = """
        import sys
        from minilm_kernels.distill.cli import main
        try:
            status = main(sys.argv[1:])
        except SystemExit as end:
            status = end.code
        heavy = {"torch", "transformers", "numpy", "yaml", "tqdm", "safetensors", "tokenizers"} & set(sys.modules)
        sys.exit(f"imported: {heavy}" if heavy else status)
    """
    given = [] if words == [] else [*REQUIRED, "--output-dir", str(tmp_path / "o"), *words]
    result = _interpreter(code, *given)
    assert result.returncode == (0 if words in (["--help"], ["--version"], ["--recipe", "list"]) else 2), result.stderr
    assert "Traceback" not in result.stderr


# --- exceptions


class _Nameless(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("--teacher: it is odd"), "error: --teacher: it is odd\n"),
        (KeyError("progress"), "error: KeyError: 'progress' (--debug prints the traceback)\n"),
        (
            ZeroDivisionError("division by zero"),
            "error: ZeroDivisionError: division by zero (--debug prints the traceback)\n",
        ),
        (_Nameless("two\nlines"), "error: _Nameless: two lines (--debug prints the traceback)\n"),
        (MemoryError(), "error: MemoryError: (--debug prints the traceback)\n"),
        (AssertionError(), "error: AssertionError: (--debug prints the traceback)\n"),
        (RecursionError("maximum recursion depth exceeded"), "error: maximum recursion depth exceeded\n"),
        (BrokenPipeError(32, "Broken pipe"), "error: [Errno 32] Broken pipe\n"),
    ],
)
@pytest.mark.parametrize("debug", [False, True])
def test_any_exception_is_a_line_and_with_debug_a_traceback(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str, debug: bool
) -> None:
    def fail(config: DistillConfig) -> None:
        raise error

    monkeypatch.setattr(loop, "distill", fail)
    status, written = run(*REQUIRED, "--output-dir", "o", *(["--debug"] if debug else []))
    assert status == 1
    assert written.endswith(f"minilm-distill: {said}")
    assert ("Traceback" in written) == debug
    assert debug or len(written.splitlines()) == 1


def test_pages_of_another_library_are_cut(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: DistillConfig) -> None:
        raise RuntimeError("x" * 100_000)

    monkeypatch.setattr(loop, "distill", fail)
    status, written = run(*REQUIRED, "--output-dir", "o")
    assert status == 1
    assert len(written) < 5000


def test_debug_is_no_setting(run: Run, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("debug: true\n")
    status, error = run("--config", "c.yaml")
    assert status == 2
    assert "unknown option 'debug'" in error


@pytest.mark.parametrize("heavy", ["torch", "transformers"])
def test_interrupted_while_it_imports(heavy: str, tmp_path: Path) -> None:
    code = """
        import sys
        from minilm_kernels.distill.cli import main

        class Interrupt:
            def find_spec(self, name, path=None, target=None):
                if name == sys.argv[1]:
                    raise KeyboardInterrupt

        sys.meta_path.insert(0, Interrupt())
        sys.exit(main(sys.argv[2:]))
    """
    result = _interpreter(code, heavy, *REQUIRED, "--output-dir", str(tmp_path / "o"))
    assert (result.returncode, result.stderr) == (130, "minilm-distill: interrupted\n")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_has_gone_is_no_traceback(stream: str, tmp_path: Path) -> None:
    code = "import sys; from minilm_kernels.distill.cli import main; sys.exit(main(sys.argv[1:]))"
    reading, writing = os.pipe()
    os.close(reading)
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: writing}
    words = (
        ["--help"] if stream == "stdout" else ["--learning-rate", "nan", *REQUIRED, "--output-dir", str(tmp_path / "o")]
    )
    command = [sys.executable, "-c", code, *words]
    result = subprocess.run(command, **streams, text=True, timeout=SECONDS, check=False)
    os.close(writing)
    assert result.returncode == (0 if stream == "stdout" else 2)
    assert not result.stderr


# --- hostile settings files: an error of one line that names the file, in bounded time, without executing code


def _laughs(key: str) -> str:
    """10^9 items under `key`, made of nine levels of aliases."""
    levels, inner = "", "x, x, x, x, x, x, x, x, x, x"
    for level in range(8):
        levels += f"  - &a{level} [{inner}]\n"
        inner = ", ".join([f"*a{level}"] * 10)
    return f"{key}:\n{levels}  - [{inner}]\n"


def _merges() -> str:
    """10^9 entries, made of nine levels of merge keys."""
    levels = "relations:\n  a0: &a0 {x: 1}\n"
    for level in range(1, 10):
        levels += f"  a{level}: &a{level} {{<<: [{', '.join([f'*a{level - 1}'] * 10)}], y{level}: 1}}\n"
    return levels


HOSTILE = {
    "laughs, a number": _laughs("learning_rate"),
    "laughs, a choice": _laughs("mask"),
    "laughs, numbers": _laughs("adam_betas"),
    "laughs, layers": _laughs("copy_layers"),
    "laughs, relations": _laughs("relations"),
    "laughs, evaluation text": _laughs("eval_text"),
    "laughs, a switch": _laughs("packing"),
    "laughs, a name": _laughs("no_such_option"),
    "merge keys": _merges(),
    "a list of itself": "learning_rate: &a [*a]\n",
    "a mapping of itself": "relations: &a {qq: *a}\n",
    "nested lists": "learning_rate: " + "[" * 20_000,
    "nested mappings": "learning_rate: " + "{a: " * 20_000,
    "nested blocks": "- " * 20_000,
    "nested keys": "? " * 20_000,
    "digits": "seed: " + "9" * 100_000,
    "hexadecimal digits": "seed: 0x" + "f" * 100_000,
    "hexadecimal digits of a float": "learning_rate: 0x" + "f" * 100_000,
    "sixties": "seed: " + "1:" * 50_000 + "1",
    "an exponent": "learning_rate: 1.0e+400\n",
    "a long name": "x" * 100_000 + ": 1\n",
    "a long value": "teacher: t\nmask: " + "x" * 100_000 + "\n",
    "a long number": "learning_rate: " + "x" * 100_000 + "\n",
    "too large a file": "#" * (LARGEST_FILE + 1),
    "a tag that runs": "teacher: !!python/object/apply:os.mkdir [made]\n",
    "a tag that runs a command": "teacher: !!python/object/apply:os.system ['mkdir made']\n",
    "a tag that imports": "teacher: !!python/module:this\n",
    "a tag that makes": "teacher: !!python/object/new:pathlib.Path [made]\n",
    "a tag of nothing": "teacher: !made x\n",
    "an empty int": "seed: !!int ''\n",
    "a float of words": "learning_rate: !!float fast\n",
    "a bool of words": "packing: !!bool maybe\n",
    "a timestamp of words": "learning_rate: !!timestamp now\n",
    "no day": "teacher: 2024-02-31\n",
    "a day": "teacher: 2024-02-28\n",
    "bytes": "teacher: !!binary AAAA\n",
    "bad bytes": "teacher: !!binary '%'\n",
    "a set": "adam_betas: !!set {0.9, 0.99}\n",
    "pairs": "relations: !!pairs [qq: 1]\n",
    "a name that is no text": "[1, 2]: 3\n",
    "a name that is no word": "? null\n: 3\n",
    "a mapping for a name": "? {a: 1}\n: 3\n",
    "two documents": "seed: 1\n---\nseed: 2\n",
    "an unknown alias": "seed: *a\n",
    "another version": "%YAML 9.9\n---\nseed: 1\n",
    "a control character": "teacher: \x07\n",
    "NUL": 'teacher: "\\0"\n',
    "a lone surrogate": 'mask: "\\ud83d"\n',
    "a lone surrogate in a name": 'teacher: "\\ud83d"\n',
    "escapes of a terminal": 'mask: "\\e[2J"\n',
    "nothing": "",
    "a word": "seed\n",
    "tabs": "\tseed:\t1\n",
    "nothing for a number": "learning_rate:\n",
    "infinity": "learning_rate: .inf\n",
    "no number": "weight_decay: .nan\n",
    "both spellings": "max_seq_length: 64\nmax-seq-length: 128\n",
    "twice": "seed: 1\nseed: 2\n",
    "a relation twice": "relations: {qq: 1, qq: 2}\n",
}
HOSTILE_JSON = {
    "nested": '{"learning_rate": ' + "[" * 100_000,
    "nested and closed": '{"learning_rate": ' + "[" * 20_000 + "]" * 20_000 + "}",
    "digits": '{"seed": ' + "9" * 100_000 + "}",
    "NaN": '{"learning_rate": NaN}',
    "Infinity": '{"adam_epsilon": Infinity}',
    "an exponent": '{"learning_rate": 1e999}',
    "twice": '{"seed": 1, "seed": 2}',
    "both spellings": '{"max_seq_length": 64, "max-seq-length": 64}',
    "a lone surrogate": '{"teacher": "\\ud83d", "learning_rate": "\\ud83d"}',
    "half": '{"seed": 1',
    "a list": "[1]",
    "null": "null",
    "comments": '{"seed": 1} // one',
}


@pytest.mark.parametrize(
    ("suffix", "content"),
    [pytest.param("yaml", text, id=f"yaml, {name}") for name, text in HOSTILE.items()]
    + [pytest.param("json", text, id=f"json, {name}") for name, text in HOSTILE_JSON.items()],
)
def test_a_hostile_settings_file_is_a_line(run: Run, tmp_path: Path, suffix: str, content: str) -> None:
    file = tmp_path / f"c.{suffix}"
    file.write_text(content, encoding="utf-8")
    needed = {"teacher": "t", "output_dir": "o", "text": "t", "student": "s"}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in needed.items() if name not in content]
    status, error = run("--config", file.name, *words)
    assert status == 2
    assert error.startswith("minilm-distill: error: ")
    assert len(error.splitlines()) == 1
    assert len(error) < 1000
    assert "is required:" not in error
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe" + "seed: 1".encode("utf-16-le"), b"seed: \xe4", bytes(range(256)), b"\x80\x04K\x01.", b"PK\x03\x04"],
)
def test_a_binary_settings_file_is_a_line(run: Run, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c.yaml").write_bytes(content)
    status, error = run("--config", "c.yaml", *REQUIRED, "--output-dir", "o")
    assert status == 2
    assert "c.yaml" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("kind", ["folder", "pipe", "loop", "below a file"])
def test_what_is_no_settings_file_is_a_line(run: Run, tmp_path: Path, kind: str) -> None:
    file = tmp_path / "c.yaml"
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "loop":
        file.symlink_to(file)
    else:
        file.write_text("")
        file = file / "below"
    status, error = run("--config", str(file), *REQUIRED, "--output-dir", "o")
    assert status == 2
    assert "c.yaml" in error
    assert len(error.splitlines()) == 1


def test_a_mark_before_the_options_is_read_over(run: Run, tmp_path: Path) -> None:
    for name, text in {"c.yaml": "learning_rate: fast", "c.json": '{"learning_rate": "fast"}'}.items():
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert (
            "--learning-rate: expected a number, got 'fast'" in run("--config", name, *REQUIRED, "--output-dir", "o")[1]
        )


# --- hostile outputs


def _blocked(kind: str, tmp_path: Path) -> str:
    path = tmp_path / "o"
    if kind == "file":
        path.write_text("kept")
    elif kind == "below a file":
        path.write_text("kept")
        path = path / "run"
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "broken link":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "long name":
        path = tmp_path / ("x" * 300)
    elif kind == "long path":
        path = tmp_path / "/".join(["x" * 100] * 60)
    elif kind == "device":
        path = Path(os.devnull)
    elif kind == "no file system for it":
        path = Path("/proc/self/o")
    elif kind == "another run":
        path.mkdir()
        (path / "settings.json").write_text("{}")
    elif kind == "file for checkpoints":
        path.mkdir()
        (path / "checkpoints").write_text("kept")
    elif kind == "folder for the lock":
        (path / ".lock").mkdir(parents=True)
    return str(path)


@pytest.mark.parametrize(
    "kind",
    [
        "file",
        "below a file",
        "pipe",
        "broken link",
        "loop",
        "long name",
        "long path",
        "device",
        "no file system for it",
        "another run",
        "file for checkpoints",
        "folder for the lock",
    ],
)
def test_an_output_that_cannot_be_is_a_line_and_left_as_it_is(run: Run, tmp_path: Path, kind: str) -> None:
    output = _blocked(kind, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    status, error = run(*REQUIRED, "--output-dir", output)
    assert status == 1
    assert error.startswith("minilm-distill: error: ")
    assert len(error.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before
    for path in before:
        if stat.S_ISREG(path.lstat().st_mode):
            assert path.read_text() in ("kept", "{}")


@pytest.mark.parametrize("output", ["", " ", "\n", "a\0b", "~no-such-user/run", "~no-such-user"])
def test_an_output_that_names_no_folder_is_refused_with_the_options(run: Run, output: str) -> None:
    status, error = run(*REQUIRED, "--output-dir", output)
    assert status == 2
    assert error.startswith("minilm-distill: error: --output-dir: ")
    assert not list(Path().iterdir())


def test_settings_of_a_run_that_were_edited_are_lines(run: Run, tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    for content in ({"relations": {"qq": "x"}}, {"adam_betas": [[1], {}]}, {"learning_rate": [[["x"] * 50] * 50] * 50}):
        (tmp_path / "o/settings.json").write_text(json.dumps(content))
        status, error = run(*REQUIRED, "--output-dir", "o", "--resume-from-checkpoint")
        assert status == 1
        assert "Traceback" not in error
        assert max(map(len, error.splitlines())) < 300

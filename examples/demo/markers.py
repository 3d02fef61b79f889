"""Replaces a generated part of a Markdown file, between `<!-- name:begin -->` and `<!-- name:end -->`."""

from pathlib import Path


def markers(name: str) -> tuple[str, str]:
    """The lines before and after the generated part."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def check_markers(file: Path, name: str) -> None:
    """Raises `FileNotFoundError` or `ValueError` if `file` does not have both markers."""
    _split(file, name)


def update(file: Path, name: str, text: str) -> None:
    """Replaces the text between the markers of `file`. The rest remains unchanged to the byte."""
    head, tail = _split(file, name)
    begin, end = markers(name)
    new = file.with_name(f".{file.name}.new")
    new.write_bytes(f"{head}{begin}\n{text.strip()}\n{end}{tail}".encode())
    new.chmod(file.stat().st_mode)
    new.replace(file)


def _split(file: Path, name: str) -> tuple[str, str]:
    begin, end = markers(name)
    if not file.is_file():
        raise FileNotFoundError(f"--update: there is no file {file}; expected a Markdown file with {begin} and {end}")
    text = file.read_bytes().decode()
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"--update: expected {begin} and below it {end} in {file}, each once; add them to it")
    return text[: text.index(begin)], text[text.index(end) + len(end) :]

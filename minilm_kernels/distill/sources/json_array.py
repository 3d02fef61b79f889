"""Splits a JSON array in a file into its elements, so that the array need not fit into memory.

Only strings, brackets and commas are parsed. If they are malformed, reading continues at the next recognizable element:
at a `{` where an object's key is expected, otherwise at the next line that begins with `{`.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK = 1 << 20
DEEPEST = 900  # levels of nested brackets, slightly below the limit of Python's parser

_OUTSIDE = re.compile(rb'["{}\[\],]')
_INSIDE = re.compile(rb'["\\\n]')  # inside a string; newlines are not allowed there
_BETWEEN = re.compile(rb"[ \t\r\n,]*")
_NEXT_OBJECT = re.compile(rb"\n[ \t\r]*(?=\{)")
_OPENER = {ord("}"): ord("{"), ord("]"): ord("[")}


class Element(NamedTuple):
    """An element of the array.

    Attributes:
        raw: its JSON; `None` for a broken or too long element.
        line: the line on which it begins, from 1.
        number: its number in the array, from 1.
        cursor: the position after the element, at which `elements` can continue; `None` if the rest of the file cannot
            be read.
        problem: description of a broken or too long element.
    """

    raw: bytes | None
    line: int
    number: int
    cursor: list[int] | None
    problem: str = ""


class _Broken(Exception):
    """The structure is broken at `position` of the buffer."""

    def __init__(self, problem: str, position: int) -> None:
        self.problem, self.position = problem, position


class _Reader:
    """A window of the file that grows at its end and shrinks at its start."""

    def __init__(self, file: BinaryIO, offset: int, line: int) -> None:
        file.seek(offset)
        self._file = file
        self.offset, self.line = offset, line  # at the start of the window; lines count from 1
        self.window = bytearray()

    def grow(self) -> bool:
        block = self._file.read(BLOCK)
        self.window += block
        return bool(block)

    def drop(self, size: int) -> bytes:
        """Removes and returns the first `size` bytes."""
        taken = bytes(self.window[:size])
        del self.window[:size]
        self.offset += size
        self.line += taken.count(b"\n")
        return taken

    def skip(self, pattern: re.Pattern[bytes]) -> bool:
        """Drops the match of `pattern` at the start. Returns False at the end of the file."""
        while True:
            match = pattern.match(self.window)
            assert match is not None
            self.drop(match.end())
            if self.window:
                return True
            if not self.grow():
                return False


def elements(file: BinaryIO, cursor: list[int] | None, largest: int) -> Iterator[Element]:
    """Yields the elements of the array.

    Args:
        file: at any position. It may begin with a byte order mark.
        cursor: the cursor of an element to continue after; `None` starts at the beginning.
        largest: elements longer than this many bytes are not kept.
    """
    offset, line, number = cursor or (0, 1, 0)
    reader = _Reader(file, offset, line)
    if cursor is None:
        reader.grow()
        if reader.window.startswith(codecs.BOM_UTF8):
            reader.drop(len(codecs.BOM_UTF8))
        if not reader.skip(_BETWEEN):
            return
        reader.drop(1)  # the opening bracket
    while True:
        more = reader.skip(_BETWEEN)
        number += 1
        line = reader.line
        if not more:
            yield Element(None, line, number, None, "the array does not end; the file may be cut off")
            return
        if reader.window[0] == ord("]"):
            reader.drop(1)
            if reader.skip(_BETWEEN):
                yield Element(None, reader.line, number, None, "there is more after the end of the array")
            return
        try:
            raw = _element(reader, largest)
        except _Broken as broken:
            rest = _resume(reader, broken.position)
            problem = broken.problem if rest else f"{broken.problem}; the rest of the file cannot be read"
            yield Element(None, line, number, [reader.offset, reader.line, number] if rest else None, problem)
            if not rest:
                return
            continue
        problem = "" if raw is not None else f"the element is longer than {largest} bytes"
        yield Element(raw, line, number, [reader.offset, reader.line, number], problem)


def _element(reader: _Reader, largest: int) -> bytes | None:
    """Reads an element; `None` if it is too long. Raises `_Broken`."""
    position, kept = 0, True
    stack = bytearray()  # open brackets
    in_string, previous = False, 0
    while True:
        match = (_INSIDE if in_string else _OUTSIDE).search(reader.window, position)
        if match is None:
            position = max(position, len(reader.window))
            if len(reader.window) > largest:
                kept = False
                dropped = len(reader.window)
                reader.drop(dropped)
                position -= dropped
            if not reader.grow():
                raise _Broken("its brackets or quotes do not end", 1 if kept else 0)
            continue
        at, position = match.start(), match.end()
        token = reader.window[at]
        if in_string:
            if token == ord("\\"):
                position += 1
            elif token == ord("\n"):
                raise _Broken("a quote does not end on its line", at)
            else:
                in_string = False
            continue
        if not stack and token in b",]":
            raw = reader.drop(at)
            return raw if kept and len(raw) <= largest else None
        if token == ord('"'):
            in_string = True
        elif token in b"{[":
            if token == ord("{") and previous == ord(",") and stack[-1:] == b"{":
                raise _Broken("an object does not end before the next", at)
            stack.append(token)
            if len(stack) > DEEPEST:
                raise _Broken(f"its brackets nest more than {DEEPEST} deep", at)
        elif token != ord(","):
            if stack[-1:] != bytes([_OPENER[token]]):
                raise _Broken("its brackets do not match", at)
            stack.pop()
        previous = token


def _resume(reader: _Reader, position: int) -> bool:
    """Drops everything up to the next object. Returns False if there is none."""
    if reader.window[position : position + 1] == b"{" and position:
        reader.drop(position)
        return True
    while True:
        match = _NEXT_OBJECT.search(reader.window, position)
        if match is not None:
            reader.drop(match.end())
            return True
        newline = reader.window.rfind(b"\n")
        begins = newline >= 0 and not reader.window[newline:].strip()  # an object may follow in the next block
        reader.drop(newline if begins else len(reader.window))
        position = 0
        if not reader.grow():
            return False

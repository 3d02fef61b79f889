"""Converts a Wikipedia dump to plain text: the prose of each article, without markup, tables, lists and references.

A full wikitext parser would not help, because captions, categories and cells would have to be removed afterwards.
"""

import bz2
import html
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

_MIN_WORDS = 12  # shorter lines are mostly remains of tables and infoboxes

_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_BLOCK = re.compile(
    r"<(ref|math|gallery|timeline|imagemap|code|source|syntaxhighlight|nowiki|pre|score|table)\b(?:[^>]*/>|.*?</\1\s*>)",
    re.DOTALL | re.IGNORECASE,
)
_TAG = re.compile(r"</?[a-z][^<>]*>", re.IGNORECASE)
# Innermost brackets first, so that nesting of any depth is resolved.
_TEMPLATE = re.compile(r"\{\{((?:[^{}]|\{(?!\{)|\}(?!\}))*)\}\}")
_TABLE = re.compile(r"\{\|(?:(?!\{\||\|\}).)*\|\}", re.DOTALL)
_LINK = re.compile(r"\[\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\]")
_URL_LINK = re.compile(r"\[(?:https?:|ftp:)?//[^\s\]]+([^\]]*)\]", re.IGNORECASE)
_EMPTY_BRACKETS = re.compile(r"\(\s*(?:[,;:]\s*)*\)")
_OPEN_BRACKET = re.compile(r"\(\s*[,;:]\s*")
_SPACE = re.compile(r"\s+")
_SPACE_BEFORE_STOP = re.compile(r"\s+([,.;:)])")
_HEADING = re.compile(r"^=+\s*(.*?)\s*=+\s*$")
_LAST_SECTIONS = {"see also", "notes", "references", "footnotes", "bibliography", "further reading", "external links"}
_NOT_PROSE = ("*", "#", ":", ";", "|", "!", "{", "}", "=", "<", "__")


def articles(dump: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields the title and the paragraphs of each article of a bz2-compressed MediaWiki XML dump, without redirects."""
    with bz2.open(dump) as stream:
        for _, page in ElementTree.iterparse(stream):
            if page.tag.rpartition("}")[2] != "page":
                continue
            if page.findtext("{*}ns") == "0" and page.find("{*}redirect") is None:
                paragraphs = clean(page.findtext("{*}revision/{*}text") or "")
                if paragraphs:
                    yield page.findtext("{*}title") or "", paragraphs
            page.clear()


def clean(wikitext: str) -> list[str]:
    """The paragraphs of prose before the closing sections (references, see also, ...)."""
    text = _BLOCK.sub("", _COMMENT.sub("", wikitext))
    text = _unwind(_TEMPLATE, _template_text, text)
    text = _unwind(_TABLE, lambda table: "", text)
    text = _unwind(_LINK, _link_text, text)
    text = html.unescape(_TAG.sub("", _URL_LINK.sub(r"\1", text)))
    text = text.replace("'''", "").replace("''", "")
    paragraphs = []
    for line in text.splitlines():
        heading = _HEADING.match(line)
        if heading and heading[1].lower() in _LAST_SECTIONS:
            break
        if line.lstrip().startswith(_NOT_PROSE):
            continue
        line = _OPEN_BRACKET.sub("(", _EMPTY_BRACKETS.sub("", line))
        line = _SPACE_BEFORE_STOP.sub(r"\1", _SPACE.sub(" ", line)).strip()
        if len(line.split()) >= _MIN_WORDS:
            paragraphs.append(line)
    return paragraphs


def _unwind(pattern: re.Pattern[str], replace: Callable[[re.Match[str]], str], text: str) -> str:
    count = 1
    while count:
        text, count = pattern.subn(replace, text)
    return text


def _template_text(template: re.Match[str]) -> str:
    """The text of a template: quantities and foreign words are part of the sentence, other templates are not."""
    name, *values = (value.strip() for value in template[1].split("|"))
    if name.lower() in ("convert", "cvt") and len(values) >= 2:
        return " ".join(values[:2])
    if name.lower() in ("lang", "nowrap", "nobr") or name.lower().startswith("lang-"):
        return next((value for value in reversed(values) if "=" not in value), "")
    return ""


def _link_text(link: re.Match[str]) -> str:
    target, *labels = link[1].split("|")
    if ":" in target and not target.startswith(":") and not labels:
        return ""  # a category or another language's article
    if target.strip().lower().startswith(("file:", "image:", "category:")):
        return ""
    return labels[-1] if labels else target.lstrip(":")

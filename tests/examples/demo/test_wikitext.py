"""Prose is kept and markup is removed, at any depth of nesting."""

import bz2

import pytest

from examples.demo.wikitext import articles, clean

LONG = "which is followed by enough further words to make this line a paragraph of prose"


@pytest.mark.parametrize(
    ("markup", "plain"),
    [
        ("'''Bold''' and ''italic''", "Bold and italic"),
        ("a [[link]] and [[target page|its label]]", "a link and its label"),
        ("text<ref name=x>{{cite|a=1}} [[b]]</ref> after<ref name=y /> it", "text after it"),
        ("out {{a|{{b|{{c}}}} {d} }}side", "out side"),
        ("about {{convert|5|km|mi|0}} or {{lang|fr|deux mots}}", "about 5 km or deux mots"),
        ("called {{lang-ca|Principat|links=no}}", "called Principat"),
        ("see [http://example.org/x?a=b the page]", "see the page"),
        ("it[[File:a.png|thumb|a [[nested]] caption [sic]]] is", "it is"),
        ("x<!-- a\n\nhidden [[note]] -->y", "xy"),
        ("a&nbsp;&amp; b < c", "a & b < c"),
        ("H<sub>2</sub>O", "H2O"),
        ("Name ({{IPA|x}}; {{lang|grc|abc}}) was", "Name (abc) was"),
        ("Name ({{IPA|x}}, ) was", "Name was"),
        ("f <math>\\frac{a}{b}</math>, so", "f, so"),
    ],
)
def test_inline_markup(markup, plain):
    assert clean(f"{markup} {LONG}.") == [f"{plain} {LONG}."]


def test_only_prose_lines_stay_and_closing_sections_end_the_article():
    text = f"""{{{{Infobox
| name = {LONG}
| other = {{{{nested|{LONG}}}}}
}}}}
First {LONG}.
* item {LONG}
{{| class="wikitable"
! {LONG}
|-
| {{| inner || {LONG}
|}}
|}}
== Heading ==
Too short to stay.
Second {LONG}.
[[Category:{LONG}]]
== References ==
Third {LONG}."""
    assert clean(text) == [f"First {LONG}.", f"Second {LONG}."]


@pytest.mark.parametrize("text", ["", "{{", "}}", "[[", "]]", "{|", "<ref>", "'''", "== ==", "{{{{{{|", "[[[[[["])
def test_broken_markup_ends(text):
    assert clean(text) == []
    assert len(clean(f"{text} {LONG} {text}")) <= 1


def test_articles_of_a_dump(tmp_path):
    page = "<page><title>{}</title><ns>{}</ns>{}<revision><text>{}</text></revision></page>"
    pages = [
        page.format("Kept", 0, "", f"One &lt;b&gt;{LONG}&lt;/b&gt;.\n\nTwo {LONG}."),
        page.format("Redirect", 0, '<redirect title="Kept" />', LONG),
        page.format("Talk:Kept", 1, "", LONG),
        page.format("Empty", 0, "", ""),
    ]
    xml = f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">{"".join(pages)}</mediawiki>'
    file = tmp_path / "dump.bz2"
    file.write_bytes(bz2.compress(xml.encode()))
    assert list(articles(file)) == [("Kept", [f"One {LONG}.", f"Two {LONG}."])]

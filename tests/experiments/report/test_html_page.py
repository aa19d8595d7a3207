"""The page needs no other file and runs nothing, whatever names the results hold."""

import base64
from html.parser import HTMLParser

import pytest

from experiments.report import html_page, tables

SVG = b'<svg xmlns="http://www.w3.org/2000/svg"></svg>'
MARKDOWN = """# Title

![A figure](a.png)

| variant | score |
| ------- | ----- |
| MHA     | 1 < 2 |

<script>alert(1)</script> and <b onclick="x">bold</b>

![secret](/etc/passwd) ![tracker](http://example.com/t.png) ![ref][r]

[r]: https://example.com/r.png
"""


class Page(HTMLParser):
    """Collects tags with attributes, and text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def named(self, name):
        return [attrs for tag, attrs in self.tags if tag == name]


@pytest.fixture(scope="module")
def page():
    return Page(html_page.page("A title", MARKDOWN, {"a.png": SVG}))


def test_figures_are_in_the_page(page):
    (image,) = page.named("img")
    kind, data = image["src"].split(",")
    assert kind == "data:image/svg+xml;base64"
    assert base64.b64decode(data) == SVG
    assert image["alt"] == "A figure"


def test_nothing_is_fetched_or_run(page):
    assert not {"script", "link", "iframe", "b"} & {tag for tag, _ in page.tags}
    for _, attrs in page.tags:
        assert not any(name.startswith("on") for name in attrs)
        for name in ("src", "href", "srcset", "data"):
            assert attrs.get(name, "data:").startswith("data:")
    assert "url(" not in html_page.STYLE
    assert "@import" not in html_page.STYLE


def test_what_is_no_figure_is_its_description(page):
    assert "secret tracker ref" in page.text
    assert "<script>alert(1)</script>" in page.text


def test_tables_fit_and_text_is_escaped(page):
    """Cells are wrapped on a screen; on a narrower one, a table scrolls and the page does not."""
    assert "nowrap" not in html_page.STYLE
    assert f"max-width: {tables.PAGE_PIXELS // 16}rem" in html_page.STYLE
    assert {"class": "table"} in page.named("div")
    assert len(page.named("td")) == 2
    assert "1 < 2" in page.text
    assert page.named("html") == [{"lang": "en"}]

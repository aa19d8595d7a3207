"""Text from outside is shown as it is: it neither hides, nor formats, nor links anything."""

import os
import re
import subprocess
import sys

import pytest
from markdown_it import MarkdownIt
from matplotlib.figure import Figure

from experiments.report import html_page, plot, report, safe_text, tables
from gqa.evaluation import results
from tests.support.made_results import KEY, PARENT, network, record, variant

# A direction override, isolates, marks, zero widths, tags, soft hyphen, bells, an escape sequence,
# C1 controls, separators, private use, a lone surrogate, and a byte order mark.
HIDDEN = "\u202e\u2066\u2069\u200f\u200b\u2060\U000e0041\u00ad\x07\x1b[31m\x9b\x85\u2028\u2029"
HIDDEN += "\ue000\ud800\ufeff\x00\x7f"
MARKUP = (
    "<script>alert(1)</script>",
    "**bold** _em_ `code` ~~gone~~",
    "![x](http://a/b.png) [l](javascript:1) <http://a.b>",
    "# h",
    "&lt; &copy;",
    "a|b\\|c",
    "[1.0, 2.0](http://a.b) [1.0, 2.0][x] [1.0, 2.0] [x]: y",
    "$x^2$",
    "see http://a.b and www.a.b",
)


def assert_nothing_hidden(text):
    assert safe_text.visible(text) == text


def test_hidden_characters_are_written_as_numbers():
    assert safe_text.visible("a\u202eb\n\x1b") == "a<U+202E>b\n<U+001B>"
    for character in HIDDEN:
        if not character.isascii() or not character.isprintable():
            assert safe_text.visible(character) == f"<U+{ord(character):04X}>"


@pytest.mark.parametrize(
    "text",
    [
        "plain, 1.5%",
        "Größe 中文 ภาษา हिन्दी",
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        "👩\u200d🔬",
    ],
)
def test_what_people_write_stays(text):
    assert safe_text.visible(text) == text


@pytest.mark.parametrize("text", MARKUP)
def test_markdown_shows_the_text_itself(text):
    """Also where addresses become links, and in the cell of a table."""
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    for source in (safe_text.markdown(text), tables.markdown(["§"], [[text]])):
        tokens = [child for t in parser.parse(source) for child in t.children or ()]
        assert {token.type for token in tokens} <= {"text", "text_special"}
        assert not re.search("http:|www[.]", source)
        assert "".join(token.content for token in tokens).removeprefix("§") == text


def test_names_and_texts_of_a_results_file_reach_the_pages_as_they_are(tmp_path):
    """In every field that a page shows, on the terminal, and in pictures."""
    bad = HIDDEN.replace("\ud800", "") + "<b>|`*$\\frac$"
    heads = {"size": bad, "method": bad, "space": bad, "grouping": bad}
    texts = {"inputs": bad, "targets": [bad], "prediction": bad, "example": 0}
    records = [*network(PARENT | {"size": bad}, 20.0, 0.1), *network(variant(4) | heads, 19.0, 0.1)]
    records += [record(PARENT, "evaluate", "prediction", 1.0, task="parameter_qa") | texts]
    records += network(PARENT, 20.0, 0.1)
    outside = dict.fromkeys(("run", "commit", "device", "unit", "time"), bad)
    records = [r | outside | ({"task": bad} if r["task"] else {}) for r in records]
    results.append(tmp_path / "results.jsonl", records)
    printed = report.run(tmp_path / "results.jsonl", tmp_path, {KEY})
    page = (tmp_path / "report.html").read_text()
    for text in (printed, (tmp_path / "report.md").read_text(), page):
        assert_nothing_hidden(text)
        assert "U+202E" in text
    assert "<b>" not in page


def test_html_shows_no_markup_of_names():
    text = safe_text.markdown("<img src=x> ![a](b)")
    body = html_page.page("t", text, {}).split("<body>")[1]
    assert "<img" not in body
    assert "&lt;img src=x&gt;" in body


def test_a_dollar_in_a_label_begins_no_formula(tmp_path):
    figure = Figure()
    axes = figure.subplots()
    axes.plot([1, 2], [1, 2], label="$\\frac$")
    axes.set(title="$\\nothing{$", xscale="log")
    axes.legend()
    plot.save(figure, tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").stat().st_size


def test_a_notebooks_backend_does_not_matter():
    code = "from experiments.report import figures, plot; import experiments.aot.report"
    environment = os.environ | {"MPLBACKEND": "module://no_such_backend", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)

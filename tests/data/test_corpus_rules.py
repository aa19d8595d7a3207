"""Thresholds of the corpus: what is a duplicate, a summary, and too long."""

import json

import pytest

from gqa.data import corpus
from tests.data.test_corpus import install, packages, words  # noqa: F401  (fixtures)


@pytest.mark.parametrize(("shared", "found"), [(13, ""), (14, "near"), (19, "near"), (20, "exact")])
def test_near_is_more_than_half_of_the_ngrams(shared, found):
    """Twenty words have 13 runs of 8; 13 shared words have 6 of them, 14 have 7."""
    seen = corpus.Seen()
    first = [f"a{i}" for i in range(20)]
    assert seen.repeats(" ".join(first)) == ""
    assert seen.repeats(" ".join(first[:shared] + [f"b{i}" for i in range(20 - shared)])) == found


def test_texts_too_short_for_ngrams_repeat_only_exactly():
    seen = corpus.Seen()
    assert seen.repeats("one two three") == ""
    assert seen.repeats("one two three four") == ""
    assert seen.repeats("one  two\nthree") == "exact"


def test_a_cache_of_another_format_is_made_again(packages, tmp_path, monkeypatch):  # noqa: F811
    corpus.build(tmp_path, packages)
    assert corpus.find(tmp_path, packages) is not None
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"format": 0}))
    assert corpus.find(tmp_path, packages) is None


def test_summaries_have_3_to_30_words_and_sources_an_end(packages, install, tmp_path):  # noqa: F811
    def module(count, name):
        summary = " ".join(f"{name}{i}" for i in range(count))
        body = "".join(f"    {name}{i} = {i} + {count}\n" for i in range(500))
        return f'def f(x):\n    """{summary}"""\n{body}'

    sizes = {"two": 2, "three": 3, "thirty": 30, "more": 31}
    install("sized", {f"sized/{name}.py": module(n, name) for name, n in sizes.items()})
    built = corpus.build(tmp_path / "corpus", [*packages, "sized"])
    rows = [r for r in built.rows("code_summary", "train") if r["package"] == "sized"]
    assert sorted(len(row["summary"].split()) for row in rows) == [3, 30]
    assert {len(row["source"]) for row in rows} == {4000}

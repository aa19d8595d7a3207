"""The corpus from a small folder of fake packages: what is kept, where it goes, what is read."""

import errno
import gzip
import json
import os
import sys

import pytest

from gqa.data import corpus
from gqa.data.examples import SPLITS
from gqa.runtime.errors import UserError
from tests.support import memory

GOOGLE = '''"""Frobnicate the widgets of every gadget.

The {name} walks all gadgets one by one and applies the operator {name} to each of the
widgets it finds there, in the order in which {name} met them before.

Args:
  x: the first gadget of {name} to look at
  rate (float): how fast {name} turns,
    unit: turns per second.

Returns:
  value: not a parameter at all.
"""'''
NUMPY = '''"""Invert a {name} matrix in place.

Parameters
----------
a : array, shape (n, n)
    The {name} matrix that is inverted
    where it lies.

    A second paragraph.
b, c : int
    Two at once are left out.
tol : float
    Smallest pivot of {name} allowed.

See Also
--------
solve : what is not a parameter
    Solve a {name} system of equations.
"""'''
SPHINX = '''"""Send the {name} message.

:param str body: what {name} says
    to the world
:param count: how often {name} sends it
:returns: whether it was received
"""'''


def function(name, docstring, body="    y = x + 1\n    return {name}(y)\n"):
    return f"def {name}(x):\n    " + docstring.format(name=name) + "\n" + body.format(name=name)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """A function that puts a package of given modules in front of all others."""
    site = tmp_path / "site-packages"
    site.mkdir()
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])

    def install(name, modules, version="1.0", record=True):
        info = site / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        for path, source in modules.items():
            (site / path).parent.mkdir(parents=True, exist_ok=True)
            (site / path).write_bytes(source if isinstance(source, bytes) else source.encode())
        if record:
            (info / "RECORD").write_text("".join(f"{path},,\n" for path in [*modules, "gone.py"]))
        return info

    return install


@pytest.fixture
def packages(install):
    install("flax", {"flax/a.py": function("flaxen", GOOGLE)})
    install("optax", {"optax/a.py": function("optical", GOOGLE)})
    install("plain_text", {"plain_text/a.py": function("plainly", GOOGLE)})
    return ["flax", "optax", "plain_text"]


def words(built, task, split, field):
    return [row[field] for row in built.rows(task, split)]


def test_whole_packages_are_held_out(packages, tmp_path):
    built = corpus.build(tmp_path / "corpus", packages)
    for task in corpus.TASKS:
        splits = {s: {r["package"] for r in built.rows(task, s)} for s in SPLITS}
        assert splits == {"train": {"plain-text"}, "validation": {"optax"}, "test": {"flax"}}


def test_the_manifest_describes_packages_and_rows(packages, tmp_path):
    built = corpus.build(tmp_path / "corpus", packages)
    manifest = json.loads((tmp_path / "corpus" / "manifest.json").read_text())
    assert manifest == built.manifest
    assert set(manifest["packages"]) == {"flax", "optax", "plain-text"}
    flax = manifest["packages"]["flax"]
    assert (flax["version"], flax["split"], len(flax["sha256"])) == ("1.0", "test", 64)
    for task in corpus.TASKS:
        for split in SPLITS:
            assert manifest["counts"][task][split]["rows"] == len(built.rows(task, split)) > 0
    text = " ".join(words(built, "docstrings", "train", "text"))
    assert manifest["counts"]["docstrings"]["train"]["words"] == len(text.split())


def test_a_second_build_only_reads(packages, tmp_path, monkeypatch):
    first = corpus.build(tmp_path / "corpus", packages)
    monkeypatch.setattr(corpus, "module_texts", lambda source: pytest.fail("parsed again"))
    again = corpus.build(tmp_path / "corpus", packages[::-1])
    assert again.manifest == first.manifest


def test_another_version_or_package_builds_anew(packages, install, tmp_path):
    first = corpus.build(tmp_path / "corpus", packages)
    old = corpus.build(tmp_path / "corpus", packages[:2])
    assert old.manifest["sha256"] != first.manifest["sha256"]
    info = install("other", {"other.py": function("otherwise", SPHINX)})
    version_1 = corpus.build(tmp_path / "corpus", [*packages, "other"])
    assert version_1.manifest["packages"]["other"]["version"] == "1.0"
    metadata = (info / "METADATA").read_text()
    (info / "METADATA").write_text(metadata.replace("1.0", "2.0"))
    version_2 = corpus.build(tmp_path / "corpus", [*packages, "other"])
    assert version_2.manifest["packages"]["other"]["version"] == "2.0"


def test_a_build_that_was_cut_short_is_not_read(packages, tmp_path, monkeypatch):
    first = corpus.build(tmp_path / "corpus", packages)
    with monkeypatch.context() as patch:
        full_disk = OSError(errno.ENOSPC, "disk full")
        patch.setattr(corpus.os, "replace", lambda *_: (_ for _ in ()).throw(full_disk))
        with pytest.raises(OSError, match="disk full"):
            corpus.build(tmp_path / "corpus", packages[:2])
    assert not (tmp_path / "corpus" / "manifest.json").exists()
    again = corpus.build(tmp_path / "corpus", packages)
    assert again.manifest == first.manifest
    assert words(again, "docstrings", "train", "text")


@pytest.mark.parametrize("name", ["manifest.json", "docstrings-train.jsonl.gz"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: content[:30] + bytes([content[30] ^ 1]) + content[31:],
        lambda content: gzip.compress(b'{"text": "other"}\n'),
        lambda content: b"[" * 100_000,
        lambda content: b"[1]",
        lambda content: None,
        "pipe",
        "/dev/zero",
    ],
)
def test_a_damaged_file_is_made_again(packages, tmp_path, name, damage):
    folder = tmp_path / "corpus"
    first = corpus.build(folder, packages)
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if damage == "pipe":
        os.mkfifo(folder / name)
    elif damage == "/dev/zero":
        (folder / name).symlink_to(damage)
    elif (damaged := damage(content)) is not None:
        (folder / name).write_bytes(damaged)
    again = corpus.build(folder, packages)
    assert again.manifest == first.manifest
    assert (folder / name).read_bytes() == content


def test_a_file_damaged_after_the_build_is_named(packages, tmp_path):
    built = corpus.build(tmp_path / "corpus", packages)
    path = tmp_path / "corpus" / "docstrings-train.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"docstrings-train\.jsonl\.gz is damaged; run again"):
        built.rows("docstrings", "train")


def test_rows_that_expand_to_far_more_than_their_file_are_refused(packages, tmp_path):
    """A megabyte of zeros compressed twice would be a gigabyte in memory."""
    built = corpus.build(tmp_path / "corpus", packages)
    path = tmp_path / "corpus" / "docstrings-train.jsonl.gz"
    path.write_bytes(gzip.compress(bytes(2**20)) * 300)
    with memory.peak() as used, pytest.raises(UserError, match="is damaged; run again"):
        built.rows("docstrings", "train")
    assert used.nbytes < 2**28


def test_builds_are_equal_to_the_byte(packages, tmp_path):
    for folder in ("a", "b"):
        corpus.build(tmp_path / folder, packages)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(files) == len(corpus.TASKS) * 3 + 1
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_duplicates_go_and_the_held_out_one_stays(packages, install, tmp_path):
    held_out = GOOGLE.format(name="flaxen")
    near = held_out.replace("one by one", "two by two")
    install("copies", {"copies/a.py": f"{held_out}\n", "copies/b.py": f"{near}\n"})
    built = corpus.build(tmp_path / "corpus", [*packages, "copies"])
    assert built.manifest["duplicates"] == {"exact text": 1, "near text": 1}
    assert not any("flaxen" in text for text in words(built, "docstrings", "train", "text"))
    assert any("flaxen" in text for text in words(built, "docstrings", "test", "text"))


def test_known_code_under_a_new_docstring_is_no_row(packages, install, tmp_path):
    body = "    total = 0\n    for item in x:\n        total += item * item - 3\n    return total\n"
    modules = {
        f"wrap/{name}.py": f'def f(x):\n    """{name} the whole of everything."""\n{body}'
        for name in ("Add", "Gather")
    }
    install("wrap", modules)
    built = corpus.build(tmp_path / "corpus", [*packages, "wrap"])
    summaries = words(built, "code_summary", "train", "summary")
    assert "Add the whole of everything." in summaries
    assert "Gather the whole of everything." not in summaries
    assert "Gather the whole" in " ".join(words(built, "docstrings", "train", "text"))


def test_tests_and_unreadable_files_are_left_out(packages, install, tmp_path):
    source = function("checked", SPHINX)
    install("mixed", {
        "mixed/tests/a.py": source,
        "mixed/thing_test.py": source.replace("checked", "second"),
        "mixed/broken.py": "def f(:\n",
        "mixed/null.py": b"x = '\0'\n",
        "mixed/data.txt": "not Python",
        "mixed/fine.py": function("attested", SPHINX),
    })  # fmt: skip
    built = corpus.build(tmp_path / "corpus", [*packages, "mixed"])
    assert built.manifest["unreadable"] == ["mixed/broken.py", "mixed/null.py"]
    text = [r["text"] for r in built.rows("docstrings", "train") if r["package"] == "mixed"]
    assert len(text) == 1
    assert "attested" in text[0]


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        (GOOGLE, {"x": "the first gadget of f to look at",
                  "rate": "how fast f turns, unit: turns per second."}),
        (NUMPY, {"a": "The f matrix that is inverted where it lies.",
                 "tol": "Smallest pivot of f allowed."}),
        (SPHINX, {"body": "what f says to the world", "count": "how often f sends it"}),
    ],
    ids=["google", "numpy", "sphinx"],
)  # fmt: skip
def test_parameters_are_read_in_three_styles(packages, install, tmp_path, style, expected):
    install("styles", {"styles/a.py": function("f", style)})
    built = corpus.build(tmp_path / "corpus", [*packages, "styles"])
    rows = [r for r in built.rows("parameter_qa", "train") if r["package"] == "styles"]
    assert {row["parameter"]: row["answer"] for row in rows} == expected
    for row in rows:
        entry = " ".join(row["context"].split()[row["begin"] : row["end"]])
        assert row["parameter"] in entry
        assert entry.endswith(row["answer"])


def test_pretraining_text_has_docstrings_and_comments_in_order(packages, install, tmp_path):
    source = '''"""A module about order."""
# Copyright of somebody who wrote a very long licence here.

# The comments that explain why something is done
# read as prose and belong to the text.
x = 1  # short

class A:
    """Docstring of A.

    # A line that only looks like one.
    """
    # total = compute(x, y)[0] + {"a": 1, "b": 2}["a"] * 7

match x:
    case 1:
        def f():
            """Docstring of a function of a case."""
'''
    install("ordered", {"ordered/a.py": source})
    built = corpus.build(tmp_path / "corpus", [*packages, "ordered"])
    (row,) = [r for r in built.rows("docstrings", "train") if r["package"] == "ordered"]
    assert row["text"].split("\n\n") == [
        "A module about order.",
        "The comments that explain why something is done read as prose and belong to the text.",
        "Docstring of A.",
        "# A line that only looks like one.",
        "Docstring of a function of a case.",
    ]


def test_code_summaries_do_not_show_the_docstring(packages, tmp_path):
    built = corpus.build(tmp_path / "corpus", packages)
    (row,) = built.rows("code_summary", "train")
    assert row["source"] == "def plainly(x):\n    y = x + 1\n    return plainly(y)"
    assert row["summary"] == "Frobnicate the widgets of every gadget."


def test_mistakes_are_named(packages, install, tmp_path):
    with pytest.raises(UserError, match="'nowhere-to-be-found' is not installed"):
        corpus.build(tmp_path / "corpus", [*packages, "nowhere-to-be-found"])
    with pytest.raises(UserError, match="no validation text: add optax"):
        corpus.build(tmp_path / "corpus", ["flax"])
    install("unlisted", {}, record=False)
    with pytest.raises(UserError, match="'unlisted' has no list of its files"):
        corpus.build(tmp_path / "corpus", [*packages, "unlisted"])


def test_a_cache_of_another_format_is_made_again(packages, tmp_path, monkeypatch):
    corpus.build(tmp_path, packages)
    assert corpus.find(tmp_path, packages) is not None
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"format": 0}))
    assert corpus.find(tmp_path, packages) is None


def test_summaries_have_3_to_30_words_and_sources_an_end(packages, install, tmp_path):
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

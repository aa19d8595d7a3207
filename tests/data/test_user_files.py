"""Names lead to files and no further; columns are found; bad rows are counted."""

import json
import os

import pytest

from gqa.data import user_files
from gqa.runtime.errors import UserError
from tests.data.test_file_formats import write_arrow


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt", "in/c.jsonl", "in/d.txt", "in/notes.md", "e@2.txt", "f@2"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    return tmp_path


def test_names_are_files_globs_and_folders(folder):
    def files(names, split="test"):
        (entry,) = user_files.entries(names, split)
        assert entry.weight == 1.0
        return [os.path.relpath(file, folder) for file in entry.files]

    assert files("b.txt, a.txt,") == ["b.txt", "a.txt"]
    assert files("[ab].txt,in") == ["a.txt", "b.txt", "in/c.jsonl", "in/d.txt"]
    assert files(f"{folder}/**/*.txt") == ["a.txt", "b.txt", "e@2.txt", "in/d.txt"]
    assert files("missing.txt,missing@x") == ["missing.txt", "missing@x"]  # told when it is read
    assert files("e@2.txt,f@2") == ["e@2.txt", "f@2"]


def test_weights_make_a_mixture(folder):
    assert user_files.entries("a.txt@3,in@0.5,e@2.txt@1", "train") == [
        (["a.txt"], 3.0),
        (["in/c.jsonl", "in/d.txt"], 0.5),
        (["e@2.txt"], 1.0),
    ]


@pytest.mark.parametrize(
    ("names", "split", "message"),
    [
        ("a.txt@3,b.txt", "train", "for all of them or none"),
        ("a.txt@3", "validation", "are for training files"),
        ("a.txt@0.0", "train", r"a\.txt@0\.0: a weight must be above 0"),
        ("z*.txt", "train", r"z\*\.txt: matches no file"),
        ("empty", "train", r"empty: no file in it ends in \.jsonl"),
        ("linked", "train", r"linked/x\.txt: leads out of its folder"),
        ("saved", "validation", "validation: not there; name the folder of the split"),
    ],
)
def test_names_that_lead_nowhere_are_refused(folder, names, split, message):
    for name in ("empty", "linked", "saved"):
        (folder / name).mkdir()
    (folder / "linked" / "x.txt").symlink_to(folder / "a.txt")
    (folder / "saved" / "dataset_dict.json").write_text("{}")
    with pytest.raises(UserError, match=message):
        user_files.entries(names, split)


def save(folder, texts, **state):
    """As `datasets` saves: a stream a shard, and state.json to name them."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05}-of-{len(texts):05}.arrow" for i in range(len(texts))]
    for name, text in zip(names, texts, strict=True):
        write_arrow(folder / name, [{"translation": {"de": text, "en": [text, "x"]}}])
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"} | state
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def test_what_datasets_saved_is_read(tmp_path):
    save(tmp_path / "one", ["eins", "zwei"])
    save(tmp_path / "all" / "train", ["drei"])
    save(tmp_path / "all" / "test", ["vier"])
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')

    def texts(name, split):
        (entry,) = user_files.entries(str(tmp_path / name), split)
        column = "translation.de"
        return user_files.collect(entry, [column], lambda row: user_files.text(row, column))[0]

    assert texts("one", "train") == ["eins", "zwei"]
    assert texts("all", "train") == ["drei"]
    assert texts("all", "test") == ["vier"]
    assert texts("all/train", "validation") == ["drei"]


@pytest.mark.parametrize(
    "state",
    [
        '{"_data_files": [{"filename": "../x.arrow"}]}',
        '{"_data_files": [{"filename": "/etc/x.arrow"}]}',
        '{"_data_files": [{"filename": "state.json"}]}',
        '{"_data_files": [{"filename": 3}]}',
        '{"_data_files": []}',
        '{"_data_files": 3}',
        "[]",
        "{",
        "[" * 100_000,
        '{"_data_files": [{"filename": "a.arrow"}]}' + " " * (1 << 25),
    ],
)
def test_a_state_that_names_other_files_is_refused(tmp_path, state):
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(UserError, match=r"state\.json: not what datasets writes"):
        user_files.entries(str(tmp_path), "train")


def test_rows_chosen_by_indices_are_refused(tmp_path):
    save(tmp_path / "x", ["eins"], _indices_data_files=[{"filename": "indices.arrow"}])
    with pytest.raises(UserError, match=r"state\.json: rows are chosen by indices"):
        user_files.entries(str(tmp_path / "x"), "train")


ROW = {
    "a": "x",
    "b": ["s 1.", "s 2."],
    "answers": {"text": ["1", "2"], "start": [3, 4]},
    "squad": [{"text": "1", "start": 3}, {"text": "2", "start": 4}],
    "c.d": "dotted",
    "n": 3,
    "none": [],
    "blank": " ",
    "half": "\ud800",
}


def test_columns_and_templates():
    assert user_files.text(ROW, "a") == "x"
    assert user_files.text(ROW, "b") == "s 1. s 2."
    assert user_files.text(ROW, "q: {a} c: {b} \\1") == "q: x c: s 1. s 2. \\1"
    assert user_files.texts(ROW, "b") == ["s 1.", "s 2."]
    assert (
        user_files.texts(ROW, "answers.text") == user_files.texts(ROW, "squad.text") == ["1", "2"]
    )
    assert user_files.texts(ROW, "c.d") == ["dotted"]
    assert user_files.needed("{a} {b}", "c", "a") == ["a", "b", "c"]


@pytest.mark.parametrize(
    "column", ["n", "none", "blank", "half", "answers", "answers.start", "{n}"]
)
def test_what_is_no_text_is_bad(column):
    with pytest.raises(user_files.BadRow, match="must be text or a list of texts, none empty"):
        user_files.text(ROW, column)


@pytest.mark.parametrize("column", ["x", "a.x", "answers.x", "squad.x", "{x}", "{a} {x}"])
def test_a_missing_column_is_bad(column):
    with pytest.raises(user_files.BadRow, match=r"no column '.*x'; this row has a, b, answers, "):
        user_files.text(ROW, column)


def collect(path, lines):
    path.write_text("\n".join(lines))
    entry = user_files.Entry([str(path)], 1.0)
    return user_files.collect(entry, ["a"], lambda row: user_files.text(row, "a"))


def test_up_to_one_percent_of_bad_rows_is_left_out_and_told(tmp_path):
    path, good = tmp_path / "a.jsonl", ['{"a": "x"}'] * 693
    made, (report,) = collect(path, [*good, "bad", *good[:50], *['{"a": 3}'] * 6])
    assert made == ["x"] * 743
    assert str(report).startswith(f"7 of 750 rows are bad: {path}:694: not JSON: ")
    assert str(report).count(f"{path}:") == 5
    with pytest.raises(UserError, match=rf"8 of 701 rows are bad: {path}:694: .*; at most 1% may"):
        collect(path, [*good, *["bad"] * 8])
    assert collect(path, good) == (["x"] * 693, [])
    with pytest.raises(UserError, match=r"a\.jsonl: no rows"):
        collect(path, [""])


def test_contents_are_of_the_files_not_of_their_place(tmp_path):
    for name, content in (("a.txt", "x"), ("b.txt", "x"), ("c.txt", "y")):
        (tmp_path / name).write_text(content)
    a, b, c = (
        user_files.contents({"train": str(tmp_path / name)}) for name in ("a.txt", "b.txt", "c.txt")
    )
    assert a == b != c
    assert user_files.contents({"train": f"{tmp_path}/a.txt@2"}) != a
    assert user_files.contents({"train": "", "prefix": "x"}) == {}


def test_contents_are_of_every_split_and_say_which(tmp_path):
    for name, content in (("a.txt", "x"), ("b.txt", "y")):
        (tmp_path / name).write_text(content)
    a, b = str(tmp_path / "a.txt"), str(tmp_path / "b.txt")
    several = [
        {"train": a, "validation": a, "test": a},
        {"train": b, "validation": a, "test": a},
        {"train": a, "validation": b, "test": a},
        {"train": a, "validation": a, "test": b},
        {"train": a, "validation": a},
    ]
    found = [json.dumps(user_files.contents(options)) for options in several]
    assert len(set(found)) == len(several)

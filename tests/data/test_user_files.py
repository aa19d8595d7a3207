"""Names lead to files and no further; columns are found; bad rows are counted."""

import json
import os

import pyarrow as pa
import pyarrow.parquet
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


def test_hidden_files_are_no_data_and_others_are_said(folder):
    hidden = (".hidden.jsonl", ".ipynb_checkpoints/c-checkpoint.jsonl", "__MACOSX/._c.jsonl")
    for name in (*hidden, "sub/deeper/g.JSONL", "sub/h.jsonl.xz"):
        (folder / "in" / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / "in" / name).write_text("x")
    (folder / "in" / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    names = ["in/c.jsonl", "in/d.txt", "in/sub/deeper/g.JSONL"]
    for pattern in ("in", "in/*", "in/**"):
        ((files, _),) = user_files.entries(pattern, "test")
        assert {os.path.relpath(file, folder) for file in files} >= {*names}
        assert not any("/." in file or "__" in file for file in files)
    ((files, _),) = user_files.entries("in", "train")
    assert files == names
    (line,) = user_files.passed_over("a.txt,in")
    assert line.startswith("2 files of in do not end in .jsonl, ")
    assert line.endswith(": in/notes.md, in/sub/h.jsonl.xz; left out")
    assert user_files.passed_over("a.txt") == []


def test_a_folder_inside_that_datasets_saved_is_named(folder):
    save(folder / "in" / "saved", ["eins"])
    with pytest.raises(UserError, match="in/saved: saved by datasets; name that folder itself"):
        user_files.entries("in", "train")


def test_a_link_is_read_when_it_is_named_itself(folder):
    (folder / "linked").mkdir()
    (folder / "linked" / "x.jsonl").symlink_to(folder / "in" / "c.jsonl")
    with pytest.raises(UserError, match=r"name the files of the folder one by one, as linked/x\."):
        user_files.entries("linked", "train")
    assert user_files.entries("linked/x.jsonl", "train")[0].files == ["linked/x.jsonl"]
    save(folder / "arrows", ["eins"])
    (path,) = (folder / "arrows").glob("*.arrow")
    path.rename(folder / "elsewhere.arrow")
    path.symlink_to(folder / "elsewhere.arrow")
    with pytest.raises(UserError, match="arrow: leads out of its folder"):
        user_files.entries("arrows", "train")


def test_a_file_of_which_most_rows_are_bad_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(user_files, "HOPELESS", 10)
    with pytest.raises(UserError, match="11 of 11 rows are bad"):
        collect(tmp_path / "a.jsonl", ["bad"] * 1000)


def test_a_parquet_file_with_too_many_bad_rows_is_not_read_to_its_end(tmp_path, monkeypatch):
    """Its footer says that 21 are more than 1% of all."""
    monkeypatch.setattr(user_files, "HOPELESS", 20)
    table = pa.table({"text": ["good", "good", None] * 600})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=500)
    entry = user_files.Entry([str(tmp_path / "a.parquet")], 1.0)
    with pytest.raises(UserError, match="21 of 63 rows are bad"):
        user_files.collect(entry, ["text"], lambda row: user_files.text(row, "text"))


def test_a_bad_byte_is_named_by_its_line_where_no_line_is_blank(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nth\xffree\nfour\n")
    entry = user_files.Entry([str(tmp_path / "a.txt")], 1.0)
    with pytest.raises(UserError, match=r"a\.txt:3: not UTF-8 text"):
        user_files.collect(entry, ["text"], lambda row: user_files.text(row, "text"))


@pytest.mark.parametrize("names", ["a.txt,a.txt", "in,in/c.jsonl", "in/*,in", "linked.txt,a.txt"])
def test_a_file_that_is_named_twice_is_refused(folder, names):
    """Otherwise its rows would count twice; a mixture may name a file twice."""
    (folder / "linked.txt").symlink_to("a.txt")
    with pytest.raises(UserError, match=r"(txt|jsonl): is named twice, also as .*; name it once"):
        user_files.entries(names, "train")
    weighted = names.replace(",", "@1,") + "@1"
    assert len(user_files.entries(weighted, "train")) == 2

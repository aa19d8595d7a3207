"""No two splits have the same file or the same rows, and shared rows are counted."""

import pytest

from gqa.data import split_overlap, tasks
from gqa.runtime.errors import UserError


@pytest.mark.parametrize("kind", ["the same name", "a link", "a copy", "a folder"])
def test_no_two_splits_have_the_same_file(tmp_path, kind):
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"a": "{name}"}}')
    train = tmp_path / "train.jsonl"
    options = {"train": str(train), "test": str(tmp_path / "test.jsonl")}
    split_overlap.check_files(options)
    if kind == "a link":
        (tmp_path / "link.jsonl").symlink_to(train)
    (tmp_path / "copy.jsonl").write_bytes(train.read_bytes())
    again = {"the same name": "train.jsonl", "a link": "link.jsonl", "a copy": "copy.jsonl"}
    options["test"] = str(tmp_path / again.get(kind, ""))
    with pytest.raises(UserError, match=r"jsonl: test has the same contents as .*train\.jsonl of"):
        split_overlap.check_files(options)


def test_rows_of_two_splits_are_counted_and_the_same_splits_refused(tmp_path):
    """In other formats and another order, so that no two files have the same contents."""

    def write(split, numbers):
        path = tmp_path / f"{split}.jsonl"
        path.write_text("".join(f'{{"a": "{n}", "b": "x"}}\n' for n in numbers))
        return str(path)

    def check(train, validation, test):
        names = {
            "train": write("train", train),
            "validation": write("validation", validation),
            "test": write("test", test),
        }
        documents = {key: names[key] for key in ("train", "validation")} | {"column": "a"}
        return (
            tasks.check("files", source="a", target="b", **names),
            tasks.check("documents", **documents),
        )

    assert check(range(9), [10, 11], [12]) == ([], [])
    files, documents = check(range(9), [8, 9, 10, 8], [10, 11])
    assert [line.split("; ")[0] for line in files] == [
        "2 of 4 rows of validation are rows of train, too",
        "1 of 2 rows of test are rows of validation, too",
    ]
    assert documents == files[:1]
    # A part of another split is no copy of it.
    assert len(check(range(9), [3, 4], [12])[0]) == 1
    with pytest.raises(UserError, match="test has the same rows as train, in other files, so"):
        check([1, 2, 3], [4], [3, 1, 2, 2])
    with pytest.raises(UserError, match="validation has the same rows as train"):
        check([1, 2, 3], [3, 2, 1], [9])

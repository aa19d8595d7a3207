"""Each row of CSV and TSV is read, whatever its neighbours do with quotes."""

import csv
import io

import pytest

from gqa.data import separated_values
from gqa.runtime.errors import UserError


def write(path, rows, **options):
    """Write rows as csv does, and so as pandas does."""
    content = io.StringIO()
    csv.writer(content, lineterminator="\n", **options).writerows(rows)
    path.write_text(content.getvalue())
    return str(path)


@pytest.mark.parametrize("unclosed", ['"500,z', '500,"z', '"500","z'])
def test_an_unclosed_quote_costs_one_row(tmp_path, unclosed):
    lines = [f'{i},"x{i}"' if i % 3 == 0 else f"{i},y" for i in range(1000)]
    lines[500] = unclosed
    (tmp_path / "a.csv").write_text("\n".join(["a,b", *lines]))
    rows = list(separated_values.read_csv(str(tmp_path / "a.csv")))
    bad = [(number, row) for number, row in rows if isinstance(row, str)]
    assert [number for number, _ in bad] == [502]
    assert bad[0][1].startswith("not CSV: ")
    values = [row["a"] for _, row in rows if isinstance(row, dict)]
    assert values == [str(i) for i in range(1000) if i != 500]


def test_an_unclosed_quote_costs_one_row_where_no_other_quote_follows(tmp_path):
    (tmp_path / "a.csv").write_text('a,b\n1,2\n"3,4\n5,6\n7,8\n')
    rows = list(separated_values.read_csv(str(tmp_path / "a.csv")))
    assert [number for number, _ in rows] == [2, 3, 4, 5]
    assert rows[1] == (3, "not CSV: unexpected end of data")
    assert rows[3] == (5, {"a": "7", "b": "8"})


def test_lines_behind_many_unclosed_quotes_are_bad_unread(tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text('a,b\n1,2\n"3,4\n5,6\n7,8\n9,1\n')
    monkeypatch.setattr(separated_values, "MOST_REREAD", 10)
    rows = list(separated_values.read_csv(str(tmp_path / "a.csv")))
    assert [number for number, _ in rows] == [2, 3, 4, 5, 6]
    assert rows[-1] == (6, "inside the quote of a bad row")


TEXTS = [["a", "b"], ['say "hi"', "x"], ["two\nlines", "a\ttab"], ["p", 'q"']]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_what_pandas_writes_is_read_back(tmp_path, quoting):
    path = write(tmp_path / "a.tsv", TEXTS, delimiter="\t", quoting=quoting)
    rows = [row for _, row in separated_values.read_tsv(path)]
    assert rows == [dict(zip("ab", values, strict=True)) for values in TEXTS[1:]]


def test_quotes_of_a_plain_file_are_kept(tmp_path):
    (tmp_path / "a.tsv").write_text('a\tb\n"Yes."\tx\nsay "hi"\t"\n"no\t""\n')
    rows = [row for _, row in separated_values.read_tsv(str(tmp_path / "a.tsv"))]
    assert rows == [
        {"a": '"Yes."', "b": "x"},
        {"a": 'say "hi"', "b": '"'},
        {"a": '"no', "b": '""'},
    ]


def test_a_file_that_quotes_in_both_ways_is_refused(tmp_path):
    path = write(tmp_path / "a.tsv", TEXTS, delimiter="\t")
    with open(path, "a") as file:
        file.write('say "hi"\tx\n' * 3)
    with pytest.raises(UserError, match=r"a\.tsv: 3 rows .* doubled quotes and 3 rows .* \.jsonl"):
        list(separated_values.read_tsv(path))


def test_a_header_of_too_many_columns_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text(",".join(map(str, range(70_000))))
    with pytest.raises(UserError, match=r"a\.csv:1: the header has 70000 columns"):
        list(separated_values.read_csv(str(tmp_path / "a.csv")))

"""Each row of CSV and TSV is read, whatever its neighbours do with quotes."""

import csv
import io
import tracemalloc

import pytest

from gqa.data import file_formats, separated_values, user_files
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


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("a.csv", '"' + "x\n" * 50 + '",y', "more than 50 lines"),
        ("a.csv", ",".join(['"x"'] * 102), "more than 100 commas"),
        ("a.csv", f'"{"," * 101}",y', "more than 100 commas"),
        ("a.csv", f'"{"," * 99}",y', ""),
        ("a.tsv", "\t".join(['"x"'] * 102), "102 columns, the header has 2"),
    ],
)
def test_lines_and_values_of_a_row_are_bounded(tmp_path, monkeypatch, name, bad, message):
    monkeypatch.setattr(separated_values, "MOST_LINES", 50)
    monkeypatch.setattr(separated_values, "MOST_SEPARATORS", 100)
    separator = "," if name == "a.csv" else "\t"
    rows = [["a", "b"], ["1", "2"]]
    lines = [separator.join(row) for row in rows]
    (tmp_path / name).write_text("\n".join([lines[0], bad, lines[1]]))
    read = separated_values.read_csv if name == "a.csv" else separated_values.read_tsv
    found = list(read(str(tmp_path / name)))
    assert found[-1][1] == {"a": "1", "b": "2"}
    if message:
        assert found[0] == (2, message)
    else:
        assert found[0] == (2, {"a": "," * 99, "b": "y"})


def test_a_row_takes_a_few_times_its_bytes(tmp_path):
    """Many quoted values, and many quotes in one value."""
    for row in ("\t".join(['"ab"'] * 100_000), f'"{chr(34) * 200_000}x"'):
        (tmp_path / "a.tsv").write_text(f"a\tb\n{row}\n")
        tracemalloc.start()
        rows = [row for _, row in separated_values.read_tsv(str(tmp_path / "a.tsv"))]
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert isinstance(rows[0], str)
        assert peak < 30 * len(row)


@pytest.mark.parametrize("closed", ['40,height 5"', '40,"'])
@pytest.mark.parametrize("separator", [",", "\t"])
def test_an_unclosed_quote_that_another_one_closes_hides_no_rows(tmp_path, closed, separator):
    """The row of both quotes looks right: two columns, the second of many lines."""
    lines = [f"{i},text {i}" for i in range(100)]
    lines[3], lines[40], lines[50] = '3,"size in inches', closed, '50,"say ""hi"""'
    path = tmp_path / ("a.csv" if separator == "," else "a.tsv")
    path.write_text("\n".join(["a,b", *lines]).replace(",", separator))
    read = separated_values.read_csv if separator == "," else separated_values.read_tsv
    with pytest.raises(UserError, match=r"a\.csv:5: a quote is open over 37 lines|a\.tsv: 1 rows"):
        list(read(str(path)))


def test_a_text_of_many_lines_is_no_row_with_an_unclosed_quote(tmp_path):
    poem = "\n".join(["one, two", "three"] * 20)
    rows = [["a", "b"], [poem, "x"], ["\n".join(["no comma"] * 30), "y"]]
    for name, read in (("a.csv", separated_values.read_csv), ("a.tsv", separated_values.read_tsv)):
        path = write(tmp_path / name, rows, delimiter="," if name == "a.csv" else "\t")
        assert [list(row.values()) for _, row in read(path)] == rows[1:]


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.tsv", "\t")])
def test_a_quote_that_may_hide_a_few_rows_is_named(tmp_path, name, separator):
    """Rows 1 to 3 are hidden in the text of row 0, as far as anybody can tell."""
    lines = ["a,b", '0,"size in inches', "1,x", "2,x", '3,height 5"', '4,"two', 'lines"']
    lines += ['5,"say ""hi"""'] * 9
    (tmp_path / name).write_text("\n".join(lines).replace(",", separator))
    entry = user_files.Entry([str(tmp_path / name)], 1.0)
    texts, (report,) = user_files.collect(entry, ["b"], lambda row: row["b"])
    assert texts[0].count("\n") == 3
    assert texts[1] == "two\nlines"
    (line,) = report.lines()
    assert line.startswith("1 rows hold a quoted text of which every line looks like a row; if a")
    assert line.endswith(f": {tmp_path / name}:2")


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.txt"])
def test_lines_that_end_in_cr_alone_are_refused(tmp_path, name):
    for content in ("a,b\r1,2\r", "a,b\r1,2"):
        (tmp_path / name).write_bytes(content.encode())
        with pytest.raises(UserError, match=rf"{name}: its lines end in CR alone; convert them"):
            list(file_formats.read(str(tmp_path / name), ["a"]))
    (tmp_path / "a.csv").write_bytes(b"a,b\r\n1,2\r\n")
    assert list(file_formats.read(str(tmp_path / "a.csv"), ["a"])) == [(2, {"a": "1", "b": "2"})]
    (tmp_path / "a.csv").write_bytes(b"a,b\r")
    assert list(file_formats.read(str(tmp_path / "a.csv"), ["a"])) == []

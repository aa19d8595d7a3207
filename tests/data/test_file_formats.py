"""Every format gives the same rows, and no content of a file does more than be refused."""

import csv
import gzip
import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from gqa.data import columnar_files, file_formats, text_lines
from gqa.runtime.errors import UserError

ROWS = [
    {"de": "ein Hund", "en": "a dog"},
    {"de": 'sagt "ja",\nund geht', "en": "says yes"},
    {"de": "ä\u2028ß", "en": "x"},
]
FLAT = [ROWS[0], ROWS[2]]  # TSV has no quoting


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def write_arrow(path, rows, **options):
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, **options)


WRITERS = {
    ".jsonl": lambda path, rows: path.write_text("\n\n".join(map(json.dumps, rows))),
    ".json": lambda path, rows: path.write_text(json.dumps(rows)),
    ".tsv": lambda path, rows: path.write_text(
        "de\ten\n" + "".join("\t".join(row.values()) + "\r\n" for row in rows), newline=""
    ),
    ".csv": write_csv,
    ".parquet": lambda path, rows: pa.parquet.write_table(pa.Table.from_pylist(rows), path),
    ".arrow": write_arrow,
}


def read(path, columns=("de", "en")):
    return list(file_formats.read(str(path), columns))


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("ending", WRITERS)
def test_every_format_gives_the_same_rows(tmp_path, ending, zipped):
    rows, path = FLAT if ending == ".tsv" else ROWS, tmp_path / f"data{ending}"
    WRITERS[ending](path, rows)
    if zipped and ending not in (".parquet", ".arrow"):
        packed = path.with_name(f"{path.name}.gz")
        packed.write_bytes(gzip.compress(path.read_bytes()))
        path = packed
    found = read(path)
    assert [row for _, row in found] == rows
    numbers = {".jsonl": [1, 3, 5], ".tsv": [2, 3], ".csv": [2, 3, 5]}.get(ending, [1, 2, 3])
    assert [number for number, _ in found] == numbers
    assert file_formats.ending(path) == f"{ending}.gz" * path.name.endswith("gz") or ending
    assert file_formats.ending("data") == ""


def test_plain_text_gives_paragraphs(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff\n \none\ntwo\r\n\t\nthree\n".encode() + b"\n\xff\n\nfour")
    expected = [(3, {"text": "one\ntwo"}), (6, {"text": "three"}), (8, "not UTF-8 text")]
    assert read(path) == [*expected, (10, {"text": "four"})]


def test_a_long_line_is_bad_and_a_long_paragraph_is_divided(tmp_path, monkeypatch):
    monkeypatch.setattr(text_lines, "LONGEST", 30)
    lines = ['{"de": "x"}', '{"de": "' + "y" * 1000 + '"}', '{"de": "z"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    expected = [(1, {"de": "x"}), (2, "longer than 30 bytes"), (3, {"de": "z"})]
    assert read(tmp_path / "a.jsonl") == expected
    (tmp_path / "a.txt").write_text("".join(f"line {i:04}\n" for i in range(20)))
    texts = [row["text"] for _, row in read(tmp_path / "a.txt")]
    assert "\n".join(texts).split("\n") == [f"line {i:04}" for i in range(20)]
    assert len(texts) > 1
    (tmp_path / "a.json").write_text('[{"de": "' + "y" * 100_000 + '"}]')
    with pytest.raises(UserError, match=r"a\.json: an element is longer than 30 bytes"):
        read(tmp_path / "a.json")


def test_squad_gives_a_row_a_question(tmp_path):
    answers = [{"text": "Bonn", "answer_start": 3}, {"text": "in Bonn", "answer_start": 0}]
    question = {"id": "7", "question": "Where?", "answers": answers}
    content = {"version": "1.1", "data": [{"title": "x", "paragraphs": []}]}
    content["data"][0]["paragraphs"] = [{"context": "In Bonn.", "qas": [question, question]}]
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert read(tmp_path / "a.json") == [(i, {"context": "In Bonn.", **question}) for i in (1, 2)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"de,en\n1,2\n1,2,3\n", "3 columns, the header has 2"),
        ("a.csv", b'de,en\n1,2\n"x\ny', "not CSV: unexpected end of data"),
        ("a.csv", b"de,en\n1,2\n\xff,3\n", "not UTF-8 text"),
        ("a.json", b'[{"de": "1"}, 3]', "not a JSON object with named columns"),
        ("a.json", b'[{"de": "1"}, "x"]', "not a JSON object with named columns"),
    ],
)
def test_a_bad_row_is_said_and_the_others_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    rows = read(tmp_path / name)
    assert isinstance(rows[0][1], dict)
    assert rows[1][1] == message
    assert rows[1][0] == (3 if name == "a.csv" else 2)


def test_a_row_behind_a_bad_one_is_read(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'de,en\n"x" y,2\n3,4\n\n5,6\n')
    (_, wrong), *rows = read(tmp_path / "a.csv")
    assert wrong.startswith("not CSV")
    assert rows == [(3, {"de": "3", "en": "4"}), (5, {"de": "5", "en": "6"})]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"de,en,de\n", "a.csv:1: the header has 2 columns 'de'"),
        ("a.csv", b"\n\xff,en\n1,2\n", "a.csv:2: not UTF-8 text"),
        ("a.csv", b'"de\n', "a.csv:1: not CSV: unexpected end of data"),
        ("a.json", b"\xff", "a.json: not UTF-8 text"),
        ("a.json", b'{"a": 1}\n{"a": 2}\n', r"a.json: not JSON: Extra data .* name it \.jsonl"),
        ("a.json", b"[" * 100_000, "a.json: JSON nested too deeply"),
        ("a.json", b"3", "a.json: neither a list of objects nor in SQuAD's layout"),
        ("a.json", b'{"rows": []}', "a.json: neither a list"),
        ("a.json", b'{"data": [{"paragraphs": [{"qas": [{}]}]}]}', "a.json: neither a list"),
        ("a.json", b'{"data": [{"paragraphs": 3}]}', "a.json: neither a list"),
        ("a.json.gz", b"x", r"a.json.gz: not a whole \.gz file"),
        ("a.parquet", b"", "a.parquet: damaged or not Parquet"),
        ("a.parquet", b"PAR1" + bytes(99) + b"PAR1", "a.parquet: "),
        ("a.arrow", b"", "a.arrow: damaged or not an Arrow stream"),
        ("a.arrow", b"ARROW1\0\0" + bytes(99), "a.arrow: damaged or not an Arrow stream"),
        ("a.arrow", b"\xff\xff\xff\xff\xff\xff\xff\x7f", "a.arrow: damaged or not an Arrow"),
        ("a.doc", b"", r"a.doc: file name must end in \.jsonl, "),
    ],
)
def test_a_file_that_is_none_of_its_format_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
def test_columns_are_checked_before_a_row_is_read(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    WRITERS[ending](path, [{"a": {"x": ["1"]}, "b.c": "2", "d": "3"}])
    assert read(path, ["a.x"]) == [(1, {"a": {"x": ["1"]}})]
    with pytest.raises(UserError, match=r"no column 'e\.f'; it has a, b\.c, d"):
        read(path, ["a", "e.f"])


def refuses(path):
    """Whether it is not read, which is said of it by name."""
    try:
        read(path)
    except UserError as error:
        return str(path) in str(error)
    return False


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
def test_damage_to_a_columnar_file_is_read_or_refused(tmp_path, ending):
    path, refused = tmp_path / f"a{ending}", 0
    WRITERS[ending](path, ROWS * 20)
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        for value in (b"\xff" * 8, bytes(8)):
            path.write_bytes(content[:place] + value + content[place + 8 :])
            refused += refuses(path)
    assert refused > 10


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
def test_rows_of_many_batches_are_all_read_and_numbered_on(tmp_path, ending):
    path, count = tmp_path / f"a{ending}", 2 * columnar_files.MOST_ROWS + 3
    WRITERS[ending](path, [{"de": str(i), "en": "x"} for i in range(1, count + 1)])
    found = read(path)
    assert [number for number, _ in found] == list(range(1, count + 1))
    assert all(row["de"] == str(number) for number, row in found)

"""Rows of array_record files: what they declare is checked before they are decoded."""

import struct

import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from gqa.data import array_records, tasks
from gqa.data.array_records import BLOCK, BLOCK_HEADER, PAYLOAD, RecordFile, WrongRecords
from gqa.runtime.errors import UserError
from tests.support.prepared_datasets import prepare, trivia_row


@pytest.mark.parametrize("compression", ["uncompressed", "zstd:3"])
@pytest.mark.parametrize("rows", [1, 3, 9000])
def test_every_row_of_what_the_library_writes_is_taken(tmp_path, rows, compression):
    writer = ArrayRecordWriter(str(tmp_path / "a"), f"group_size:2,{compression}")
    for i in range(rows):
        writer.write(b"row %d " % i * (1 + i % 50))
    writer.close()
    file = RecordFile(tmp_path / "a")
    for row in {0, rows // 3, rows - 1}:
        file.check(row)
    with pytest.raises(WrongRecords, match=f"row {rows + 1} is in no chunk"):
        file.check(rows + 1)


def test_a_small_file_of_a_large_row_is_refused_unread(tmp_path):
    """128 KiB with 80 MB."""
    writer = ArrayRecordWriter(str(tmp_path / "a"), "group_size:1")
    writer.write(b"x" * 80_000_000)
    writer.write(b"small")
    writer.close()
    assert (tmp_path / "a").stat().st_size == 2 * BLOCK
    file = RecordFile(tmp_path / "a")
    file.check(1)
    with pytest.raises(WrongRecords, match=r"a: the chunk of row 0 declares 80,000,000 bytes"):
        file.check(0)


def test_a_dataset_with_a_large_row_names_its_file(tmp_path, monkeypatch):
    def row(i):
        return trivia_row(i) | {"question": "x" * 10_000 if i else "Where?"}

    prepare(tmp_path, "trivia_qa/rc", row, splits=("train", "validation"))
    assert len(tasks.get("trivia_qa").load("train", data_dir=str(tmp_path))) == 3
    monkeypatch.setattr(array_records, "MOST_CHUNK", 10_000)
    with pytest.raises(
        UserError, match=r"record . is damaged: .*array_record.* declares 10,\d\d\d"
    ):
        tasks.get("trivia_qa").load("train", data_dir=str(tmp_path))


# --- files that the library does not write --------------------------------------------------------


def varint(number):
    low = [number & 127 | 128]
    while number := number >> 7:
        low.append(number & 127 | 128)
    return bytes([*low[:-1], low[-1] & 127])


def message(*fields):
    return b"".join(varint(i << 3) + varint(field) for i, field in enumerate(fields, start=1))


def header(kind, stored, rows, decoded):
    return struct.pack("<5Q", 0, stored, 0, ord(kind) | rows << 8, decoded)


def chunk(rows, kind="r", compression=0, decoded=None, number=None):
    sizes, content = b"".join(varint(len(row)) for row in rows), b"".join(rows)
    data = bytes([compression]) + varint(len(sizes)) + sizes + content
    decoded = len(content) if decoded is None else decoded
    return header(kind, len(data), len(rows) if number is None else number, decoded) + data


def build(path, data=None, entries=None, number=2, footer=None, end=None):
    """Write a file of two chunks of a row; hashes are left out, because the library checks them."""
    payload, places = header("s", 0, 0, 0), []
    for row in (b"first", b"second"):
        places.append(in_file(len(payload)))
        payload += chunk([row], **(data or {}))
    entries = [(place, 6, 1) for place in places] if entries is None else entries(places)

    begin = in_file(len(payload))
    metadata = message(1, number, 2)
    records = [b"\x0a" + varint(len(metadata)) + metadata, *(message(*entry) for entry in entries)]
    payload += chunk(records, **(footer or {}))
    payload += bytes(-len(payload) % PAYLOAD) + chunk([message(begin if end is None else end)] * 3)
    payload += bytes(-len(payload) % PAYLOAD)
    blocks = [payload[i : i + PAYLOAD] for i in range(0, len(payload), PAYLOAD)]
    path.write_bytes(b"".join(bytes(BLOCK_HEADER) + block for block in blocks))


def in_file(place):
    return place // PAYLOAD * BLOCK + BLOCK_HEADER + place % PAYLOAD


WRONG = {
    "more chunks than records": ({"number": 2**60}, "its footer is damaged"),
    "fewer chunks than records": ({"number": 1}, "its footer is damaged"),
    "no rows": ({"entries": lambda p: [(p[0], 6, 0), (p[1], 6, 0)]}, "its footer is damaged"),
    "no place": ({"entries": lambda p: [(p[0],), (p[1], 6, 0, 1, 1)]}, "its footer is damaged"),
    "a long number": ({"entries": lambda p: [(2**64, 6, 1), (p[1], 6, 1)]}, "footer is damaged"),
    "a footer of another kind": ({"footer": {"kind": "t"}}, "its footer is damaged"),
    "a footer of brotli": ({"footer": {"compression": 98}}, "its footer is damaged"),
    "a footer that is no zstd": ({"footer": {"compression": 122}}, "its footer is damaged"),
    "a large footer": ({"footer": {"decoded": 2**40}}, "its footer is damaged"),
    "a footer of many records": ({"footer": {"number": 2**40}}, "its footer is damaged"),
    "a footer behind the file": ({"end": 2**40}, "its footer has -1,"),
    "a chunk behind the file": (
        {"entries": lambda p: [(2**40, 6, 1), (2**40 + 100, 6, 1)]},
        "chunk of row 0 is damaged",
    ),
    "chunks in another order": (
        {"entries": lambda p: [(p[1], 6, 1), (p[0], 6, 1)]},
        "chunk of row 0 is damaged",
    ),
    "chunks far from each other": (
        {"entries": lambda p: [(p[0], 6, 1), (2**40, 6, 1)]},
        "declares 1,099,511,627,712 bytes",
    ),
    "a chunk of another kind": ({"data": {"kind": "t"}}, "chunk of row 0 is damaged"),
    "a chunk of a gigabyte": ({"data": {"decoded": 2**30}}, "declares 1,073,741,824 bytes"),
    "a chunk of many rows": ({"data": {"number": 2**40}}, "declares 8,796,093,022,208 bytes"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_crafted_file_is_refused(tmp_path, name):
    build(tmp_path / "a")
    for row in (0, 1):
        RecordFile(tmp_path / "a").check(row)
    options, expected = WRONG[name]
    build(tmp_path / "a", **options)
    with pytest.raises(WrongRecords, match=rf"a: .*{expected}"):
        RecordFile(tmp_path / "a").check(0)


def test_a_footer_of_a_sparse_file_is_refused(tmp_path):
    """The library would read the whole of it."""
    build(tmp_path / "a")
    content = (tmp_path / "a").read_bytes()
    with open(tmp_path / "a", "r+b") as file:
        file.seek(1 << 40)
        file.write(content[-BLOCK:])
    with pytest.raises(WrongRecords, match=r"its footer has 1,099,511,\d\d\d,\d\d\d bytes"):
        RecordFile(tmp_path / "a")

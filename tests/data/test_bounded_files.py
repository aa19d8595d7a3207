"""What a file declares or expands to is bounded before it is decoded, and only files are read."""

import bz2
import contextlib
import gzip
import json
import os
import pickle

import pyarrow as pa
import pyarrow.parquet
import pytest

from gqa.data import file_formats, parquet_pages, text_lines, tokenizer
from gqa.runtime.errors import UserError

ROWS = [{"de": f"Satz {i}", "en": f"sentence {i}"} for i in range(3)]


def read(path):
    return [row for _, row in file_formats.read(str(path), ["de"])]


def compress_zstd(content):
    return pa.compress(content, codec="zstd", asbytes=True)


@pytest.mark.parametrize(
    ("ending", "compress"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".zst", compress_zstd), ("", bytes)],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "A.JSONL", "a.json"])
def test_every_compression_gives_the_same_rows(tmp_path, name, ending, compress):
    content = json.dumps(ROWS) if name == "a.json" else "\n".join(map(json.dumps, ROWS))
    path = tmp_path / f"{name}{ending.upper() if name.isupper() else ending}"
    path.write_bytes(compress(content.encode()))
    assert read(path) == ROWS
    if ending:
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(UserError, match=rf"{path.name}: not a whole \{ending} file"):
            read(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.tsv"])
@pytest.mark.parametrize(
    ("ending", "compress"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".zst", compress_zstd)],
)
def test_a_file_that_expands_too_much_is_refused(tmp_path, monkeypatch, name, ending, compress):
    monkeypatch.setattr(text_lines, "SMALL", 1 << 20)
    unit = b" " if name == "a.json" else b"d" * 9999 + b"\n"
    path = tmp_path / f"{name}{ending}"
    path.write_bytes(compress(b"[" * (name == "a.json") + unit * ((1 << 22) // len(unit))))
    with pytest.raises(UserError, match=rf"{name}\{ending}: expands to more than 200 times"):
        for _ in file_formats.read(str(path), ["de"]):
            pass


def stream(path, batch, **options):
    with pa.ipc.new_stream(str(path), batch.schema, options=pa.ipc.IpcWriteOptions(**options)) as w:
        w.write_batch(batch)


def repeated(count=1000, size=430_000):
    """One long text, kept once and used in every row."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), ["x" * size])


def list_view():
    """Every row is the same thousand texts."""
    places, sizes = pa.array([0] * 1000, pa.int32()), pa.array([1000] * 1000, pa.int32())
    return pa.ListViewArray.from_arrays(places, sizes, pa.array(["x"] * 1000))


HOSTILE_COLUMNS = {
    "rows of nothing": (pa.nulls(2**31 - 1), "declares 2,147,483,647 rows in 0 bytes"),
    "elements of nothing": (
        pa.FixedSizeListArray.from_arrays(pa.nulls(2**30), 2**30),
        "declares 1 rows in 0 bytes",
    ),
    "lists of nothing": (
        pa.ListArray.from_arrays([0, 2**30], pa.nulls(2**30)),
        "declares 1,073,741,824 rows",
    ),
    "views": (list_view(), "column 'de' has type list_view"),
    "runs": (pa.RunEndEncodedArray.from_arrays([2**30], ["x"]), "declares 1,073,741,824 rows"),
    "string views": (pa.array(["x"], pa.string_view()), "column 'de' has type string_view"),
    "an extension": (
        pa.ExtensionArray.from_storage(pa.json_(), pa.array(['"x"'])),
        "column 'de' has type extension",
    ),
    "one text for all rows": (repeated(), "texts are over 200 times as long as the file"),
}


@pytest.mark.parametrize("name", HOSTILE_COLUMNS)
def test_an_arrow_stream_that_declares_too_much_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(text_lines, "SMALL", 1 << 20)
    column, message = HOSTILE_COLUMNS[name]
    stream(tmp_path / "a.arrow", pa.record_batch([column], ["de"]))
    with pytest.raises(UserError, match=rf"a\.arrow: .*{message}"):
        read(tmp_path / "a.arrow")


class RunsWhenLoaded:
    """An object whose pickle makes a folder when it is loaded."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("name", ["arrow.py_extension_type", "pickle", "arrow.json", "arrow.uuid"])
@pytest.mark.parametrize("nested", [False, True])
def test_the_name_of_an_extension_type_runs_no_code(tmp_path, name, nested):
    """The parameters of an extension type may be a pickle, in any column and in the schema."""
    payload = pickle.dumps(RunsWhenLoaded(str(tmp_path / "ran")))
    pickle.loads(payload)
    (tmp_path / "ran").rmdir()  # so the pickle does what it says

    extension = {"ARROW:extension:name": name, "ARROW:extension:metadata": payload}
    kind = pa.list_(pa.field("item", pa.string(), metadata=extension)) if nested else pa.string()
    fields = [pa.field("de", kind, metadata=extension), pa.field("en", kind, metadata=extension)]
    schema = pa.schema(fields, metadata=extension)
    column = [["x"]] if nested else ["x"]
    batch = pa.RecordBatch.from_arrays([pa.array(column, kind)] * 2, schema=schema)
    stream(tmp_path / "a.arrow", batch)
    pyarrow.parquet.write_table(pa.Table.from_batches([batch]), tmp_path / "a.parquet")

    for path in (tmp_path / "a.arrow", tmp_path / "a.parquet"):
        with contextlib.suppress(UserError):
            assert read(path) == [{"de": column[0]}]
        assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_a_compressed_arrow_stream_is_refused(tmp_path, codec):
    stream(tmp_path / "a.arrow", pa.RecordBatch.from_pylist(ROWS), compression=codec)
    with pytest.raises(UserError, match=r"a\.arrow: .*compressed; save it without compression"):
        read(tmp_path / "a.arrow")


@pytest.mark.parametrize("dictionary", [True, False])
def test_a_parquet_file_of_one_text_for_all_rows_is_refused(tmp_path, monkeypatch, dictionary):
    monkeypatch.setattr(text_lines, "SMALL", 1 << 20)
    column = repeated(300, 100_000)
    pyarrow.parquet.write_table(
        pa.table({"de": column if dictionary else column.cast(pa.string())}),
        tmp_path / "a.parquet",
        compression="zstd",
        use_dictionary=dictionary,
        column_encoding=None if dictionary else {"de": "DELTA_BYTE_ARRAY"},
        store_schema=False,
        write_statistics=False,
    )
    with pytest.raises(UserError, match=r"a\.parquet: its texts are over 200 times as long"):
        read(tmp_path / "a.parquet")


def test_an_arrow_list_of_one_long_text_many_times_is_refused(tmp_path):
    texts = pa.DictionaryArray.from_arrays(pa.array([0, 0], pa.int8()), pa.array(["a" * 100]))
    lists = pa.ListArray.from_arrays(pa.array([0, 2], pa.int32()), texts)
    stream(tmp_path / "a.arrow", pa.record_batch({"de": lists}))
    with pytest.raises(UserError, match=r"column .de. has type list.*; save its texts as they are"):
        read(tmp_path / "a.arrow")


def test_a_parquet_file_of_lists_of_nothing_is_refused_unread(tmp_path, monkeypatch):
    """A few hundred bytes may stand for millions of nulls, each of which is a Python object."""
    monkeypatch.setattr(parquet_pages, "FEW_VALUES", 1 << 10)
    monkeypatch.setattr(text_lines, "SMALL", 1 << 16)
    for nulls in (3000, 60_000):
        lists = pa.array([[None] * nulls], pa.list_(pa.null()))
        pyarrow.parquet.write_table(pa.table({"de": lists}), tmp_path / f"{nulls}.parquet")
    assert len(read(tmp_path / "3000.parquet")[0]["de"]) == 3000
    with pytest.raises(UserError, match=r"60000\.parquet: .* declares 60,000 values"):
        read(tmp_path / "60000.parquet")


def test_a_parquet_page_that_expands_too_much_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(text_lines, "SMALL", 1 << 20)
    pyarrow.parquet.write_table(
        pa.table({"de": ["x" * 10_000_000], "en": ["y"]}),
        tmp_path / "a.parquet",
        compression="zstd",
    )
    with pytest.raises(UserError, match=r"a\.parquet: .*column de expands to 10,000,0\d\d bytes"):
        read(tmp_path / "a.parquet")
    assert len(list(file_formats.read(str(tmp_path / "a.parquet"), ["en"]))) == 1


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("codec", ["none", "snappy", "zstd"])
def test_parquet_of_every_kind_is_read(tmp_path, version, codec):
    rows = [{"de": f"a{i % 7}", "answers": {"text": ["x", str(i)], "n": [i]}} for i in range(3000)]
    table = pa.Table.from_pylist(rows)
    pyarrow.parquet.write_table(
        table,
        tmp_path / "a.parquet",
        compression=codec,
        data_page_version=version,
        row_group_size=1000,
    )
    assert [row for _, row in file_formats.read(tmp_path / "a.parquet", ["de", "answers"])] == rows


@pytest.mark.parametrize("ending", sorted(file_formats.READERS))
def test_only_regular_files_are_read(tmp_path, ending):
    os.mkfifo(tmp_path / f"pipe{ending}")
    os.symlink("/dev/zero", tmp_path / f"zero{ending}")
    os.symlink("missing", tmp_path / f"dangling{ending}")
    for name, message in [
        ("pipe", "is a device, a pipe"),
        ("zero", "is a device, a pipe"),
        ("dangling", "a link to missing, which is not there"),
    ]:
        with pytest.raises(UserError, match=rf"{name}\{ending}: {message}"):
            read(tmp_path / f"{name}{ending}")


@pytest.mark.parametrize("ending", sorted({*file_formats.READERS} - {".arrow", ".parquet"}))
def test_a_sparse_file_is_refused(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(text_lines, "LONGEST", 1 << 16)
    with open(tmp_path / f"a{ending}", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match=rf"a\{ending}"):
        for _ in file_formats.read(str(tmp_path / f"a{ending}"), ["de"]):
            pass


def test_a_record_of_many_lines_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(text_lines, "LONGEST", 1000)
    (tmp_path / "a.csv").write_text("de,en\n" + '"\n",' * 1000 + "\n1,2\n")
    rows = list(file_formats.read(str(tmp_path / "a.csv"), ["de"]))
    assert rows[0] == (2, "longer than 1000 bytes")
    assert rows[-1][1] == {"de": "1", "en": "2"}


def test_a_vocabulary_is_a_regular_file_of_bounded_size(tmp_path):
    os.mkfifo(tmp_path / "pipe.model")
    with pytest.raises(UserError, match=r"vocabulary .*pipe\.model: is a device, a pipe"):
        tokenizer.load(tmp_path / "pipe.model")
    with open(tmp_path / "a.model", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match=r"vocabulary .*a\.model: has more than 16,777,216 bytes"):
        tokenizer.load(tmp_path / "a.model")


def test_one_element_of_a_json_list_is_held_at_a_time(tmp_path):
    rows = [{"de": "x" * 1000, "en": str(i)} for i in range(500)]
    for content in (rows, {"version": 1, "data": rows, "more": [rows]}):
        (tmp_path / "a.json").write_text(json.dumps(content, indent=1))
        assert read(tmp_path / "a.json") == rows

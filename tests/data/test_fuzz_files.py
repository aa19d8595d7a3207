"""Whatever stands in a user's file, it is read or refused by its line before the job begins."""

import functools
import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gqa.data import tasks, tokenizer
from gqa.data.examples import SPLITS
from tests.experiments import test_fuzz_configs as test_fuzz

stubs, workdir = test_fuzz.stubs, test_fuzz.workdir  # fixtures
once, run = test_fuzz.once, test_fuzz.run

ROWS = [{"source": f"quelle {i}", "target": f"ziel {i}"} for i in range(6)]
DEEP, LONG = "[" * 20_000, "1" * 5000
# Lines that are wrong by construction, wherever they stand.
WRONG_JSON = [
    *(
        "nonsense",
        "[]",
        "3",
        "null",
        '"x"',
        "{",
        "{}",
        "{'source': 1}",
        DEEP,
        '{"a": ' + DEEP,
        LONG,
    ),
    *(f'{{"source": {LONG}, "target": "x"}}', '{"source": "x"}', '{"target": "x"}', "NaN", "\0"),
    *('{"source": "a\0b", "target": "x"}', '{"source": "x", "target": "y"} {}', '{"Source": "x"}'),
    *(f'{{"source": {value}, "target": "x"}}' for value in ("1", "null", '""', '" "', '["x", 1]')),
    *(f'{{"source": "x", "target": {value}}}' for value in ("1", "null", '""', "[]", '["x", 1]')),
    *('{"source": "\\ud800", "target": "x"}', '{"source": "x", "target": ["x", "\\udfff"]}'),
    *('{"source": "x", "target": [["x", 1]]}', '{"source": "x", "target": {"x": "y"}}'),
    "\ufeff{}",
]
WRONG_TSV = ["x", "x\ty\tz", "x\t ", "\tx", "\t\t"]
NOT_UTF8 = [b"\xff", b"\xc3(", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", "ä".encode("latin-1")]


def jsonl(rows):
    return [json.dumps(row).encode() for row in rows]


def tsv(rows):
    return [b"source\ttarget", *(f"{row['source']}\t{row['target']}".encode() for row in rows)]


def csv(rows):
    return [line.replace(b"\t", b",") for line in tsv(rows)]


def array(rows):
    return [b"[" + b",\n".join(jsonl(rows)) + b"]"]


def columnar(write, rows):
    sink = pa.BufferOutputStream()
    write(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def write_stream(table, sink):
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)


FORMATS = {".jsonl": jsonl, ".tsv": tsv, ".jsonl.gz": jsonl, ".tsv.gz": tsv}
OTHERS = {
    ".csv": csv,
    ".csv.gz": csv,
    ".json": array,
    ".json.gz": array,
    ".parquet": functools.partial(columnar, pa.parquet.write_table),
    ".arrow": functools.partial(columnar, write_stream),
}


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    """A function that writes lines, or whole contents, to a file of a format."""
    folder = tmp_path_factory.mktemp("files")

    def write(ending, content, name="data"):
        path = folder / f"{name}{ending}"
        content = (
            b"".join(line + b"\n" for line in content) if isinstance(content, list) else content
        )
        path.write_bytes(gzip.compress(content, 1) if ending.endswith(".gz") else content)
        return path

    return write


def begin(workdir, write, path, split="train"):
    """None if the job begins with the file as one of three, else the line that refuses it."""
    # No two splits may have the same file.
    paths = {s: write(".jsonl", jsonl(ROWS[i:]), s) for i, s in enumerate(SPLITS)} | {split: path}
    options = [f"--config.files.{split}={path}" for split, path in paths.items()]
    return run(workdir, "--config.finetune.tasks=files", "--config.pretrain.task=files", *options)


def assert_readable(path):
    """The job will later do no more with the file than this."""
    columns = {"source": "source", "target": "target"}
    for example in tasks.get("files").load("train", train=str(path), **columns):
        for part in (example.inputs, *example.targets):
            assert part.strip()
            part.encode()


@given(
    st.sampled_from(sorted(FORMATS)),
    st.integers(0, len(ROWS)),
    st.sampled_from(SPLITS),
    st.booleans(),
    st.data(),
)
@once(max_examples=200)
def test_a_wrong_line_is_named_wherever_it_stands(workdir, write, ending, place, split, crlf, data):
    lines = FORMATS[ending](ROWS)
    texts = WRONG_JSON if ".jsonl" in ending else WRONG_TSV
    wrong = [*(text.encode("utf-8", "surrogatepass") for text in texts), *NOT_UTF8]
    line = data.draw(st.sampled_from(wrong))
    place = place + 1 if ending.startswith(".tsv") else place  # behind the header
    lines.insert(place, line)
    if crlf:
        lines = [line + b"\r" for line in lines]
    path = write(ending, lines)
    said = begin(workdir, write, path, split)
    assert said is not None, line
    assert f"{path}:{place + 1}: " in said


@given(st.sampled_from(sorted(FORMATS | OTHERS)), st.data())
@once(max_examples=400)
def test_a_damaged_file_is_read_or_refused(workdir, write, ending, data):
    path = write(ending, (FORMATS | OTHERS)[ending](ROWS * data.draw(st.sampled_from([1, 50]))))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        begin_at = data.draw(st.integers(0, len(content)))
        end = min(len(content), begin_at + data.draw(st.sampled_from([0, 1, 5, 10**6])))
        junk = [
            b"\0",
            b'"',
            b"\t",
            b"\n",
            b"\r",
            b"{",
            b"\\u0",
            b"\xff\xfe",
            b"\xef\xbb\xbf",
            b"\x1f\x8b",
        ]
        content[begin_at:end] = data.draw(st.one_of(st.sampled_from(junk), st.binary(max_size=6)))
    path.write_bytes(content)
    said = begin(workdir, write, path)
    if said is None:
        assert_readable(path)
    else:
        assert f"{path}:" in said


@given(st.text(min_size=1), st.text(min_size=1), st.sampled_from(sorted(FORMATS)))
@once(max_examples=100)
def test_any_text_is_read_or_refused(workdir, write, source, target, ending):
    lines = FORMATS[ending]([{"source": "x", "target": "y"}])
    row = (
        json.dumps({"source": source, "target": target})
        if "jsonl" in ending
        else f"{source}\t{target}"
    )
    path = write(ending, [*lines, row.encode("utf-8", "surrogatepass")])
    said = begin(workdir, write, path)
    assert_readable(path) if said is None else None
    assert said is None or f"{path}:" in said


WHOLE = {
    "nothing": b"",
    "blank lines": b"\n \n\t\n",
    "only a BOM": b"\xef\xbb\xbf",
    "UTF-16": "source\ttarget\nx\ty\n".encode("utf-16"),
    "UTF-16 without its mark": "source\ttarget\nx\ty\n".encode("utf-16-le"),
    "zeros": bytes(1000),
    "a gzip file by another name": gzip.compress(b"source\ttarget\nx\ty\n"),
}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("ending", FORMATS)
def test_a_file_without_a_row_is_refused(workdir, write, name, ending):
    path = write(ending, WHOLE[name])
    assert f"{path}:" in begin(workdir, write, path)


@pytest.mark.parametrize(
    "content", [b"source\ttarget\n", b"source\n", b"source\tsource\ttarget\nx\ty\tz\n"]
)
def test_a_header_alone_or_a_wrong_one_is_refused(workdir, write, content):
    path = write(".tsv", content)
    assert f"{path}:" in begin(workdir, write, path)


@pytest.mark.parametrize(
    "content", ["\ufeffsource\ttarget\r\nx\ty", "\n\nsource\ttarget\n \nx\u2028\0\x85\ty\x0b\n"]
)
def test_marks_line_ends_and_odd_characters_are_read(workdir, write, content):
    path = write(".tsv", content.encode())
    assert begin(workdir, write, path) is None
    assert_readable(path)


def test_what_is_no_readable_file_is_named(workdir, write, tmp_path):
    (tmp_path / "folder.tsv").mkdir()
    (tmp_path / "loop.tsv").symlink_to("loop.tsv")
    (tmp_path / "data.tsv").touch()
    os.mkfifo(tmp_path / "pipe.tsv")
    names = [
        "folder.tsv",
        "loop.tsv",
        "pipe.tsv",
        "missing.jsonl",
        "data.tsv/x.tsv",
    ]
    if os.geteuid():
        (tmp_path / "closed.tsv").touch(0o000)
        names.append("closed.tsv")
    for name in [*names, "data.xls", "data"]:
        assert f"{tmp_path / name}: " in begin(workdir, write, tmp_path / name)
    # No file can have this name, so that the key is named.
    too_long = begin(workdir, write, tmp_path / ("x" * 300 + ".tsv"))
    assert "files.train=" in too_long
    assert "File name too long" in too_long


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "small.model"
    tokenizer.train([" ".join(f"w{i} x{i * i}" for i in range(300))], 460, path)
    return path


@given(st.data())
@once(max_examples=150)
def test_a_damaged_vocabulary_is_read_or_refused(workdir, vocabulary, data):
    content = bytearray(vocabulary.read_bytes())
    start = data.draw(st.one_of(st.integers(0, 9000), st.integers(0, len(content))))
    end = start + data.draw(st.sampled_from([0, 1, 7, len(content)]))
    content[start:end] = data.draw(st.binary(max_size=8))
    path = vocabulary.with_name("damaged.model")
    path.write_bytes(content)
    said = run(workdir, f"--config.text.vocabulary={path}")
    assert said is None or f"vocabulary {path}: " in said or "vocab_size" in said


@pytest.mark.parametrize("content", [b"", b"x", bytes(100), b"\n\0", b"\xff" * 1000])
def test_what_is_no_vocabulary_is_refused(workdir, vocabulary, content):
    path = vocabulary.with_name("garbage.model")
    path.write_bytes(content)
    assert f"vocabulary {path}: " in run(workdir, f"--config.text.vocabulary={path}")


def test_a_vocabulary_larger_than_the_embedding_is_refused(workdir, vocabulary):
    option = f"--config.text.vocabulary={vocabulary}"
    assert run(workdir, option, "--config.model.vocab_size=460") is None
    said = run(workdir, option, "--config.model.vocab_size=459")
    assert "model.vocab_size=459 is too small; use 460 or more" in said

"""Tasks are found by name, phrase their examples, and name the mistakes in a user's files."""

import gzip
import os
import pkgutil
from types import SimpleNamespace

import pytest

from gqa.data import tasks
from gqa.data.examples import Example
from gqa.evaluation import metrics
from gqa.runtime.errors import UserError

DOCUMENTS = {"docstrings", "documents", "c4"}
CORPUS_ROWS = {
    "docstrings": [{"text": "Some prose."}],
    "docstring_summary": [{"source": "The rest.", "summary": "The line."}],
    "code_summary": [{"source": "def f(): ...", "summary": "The line."}],
    "parameter_qa": [
        {
            "context": " ".join(f"w{i}" for i in range(200)),
            "parameter": "w100",
            "answer": "w102 w103 w104",
            "begin": 100,
            "end": 105,
        }
    ],
}


@pytest.fixture
def corpus():
    return SimpleNamespace(rows=lambda task, split: CORPUS_ROWS[task])


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        content = content.encode() if isinstance(content, str) else content
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return str(path)

    return write


def load(path, **options):
    return tasks.get("files").load("train", train=path, source="de", target="en", **options)


JSONL = '{"de": "ein Hund", "en": "a dog", "x": 1}\n\n{"de": "zwei", "en": ["two", "2"]}\n'
TSV = 'x\tde\ten\n1\tein "Hund\ta dog\r\n'


def test_every_module_is_a_task():
    assert {"code_summary", "docstrings", "documents", "files", "parameter_qa"} <= {*tasks.names()}
    assert tasks.names() == sorted(m.name for m in pkgutil.iter_modules(tasks.__path__))
    with pytest.raises(UserError, match=r"task='docs' is unknown; choose from arxiv, .*files"):
        tasks.get("docs")


def test_metrics_of_every_task_exist():
    for name in set(tasks.names()) - DOCUMENTS:
        names, headline = tasks.scoring(name)
        assert headline in names
        assert set(names) <= set(metrics.METRICS)
    assert set(tasks.get("files").METRICS) == set(metrics.METRICS)
    assert tasks.scoring("files", metrics=["bleu"]) == (("bleu",), "bleu")
    assert tasks.scoring("files", metrics=["bleu", "rougeL"])[1] == "rougeL"


def test_corpus_tasks_phrase_their_inputs(corpus):
    def one(name, **options):
        (example,) = tasks.get(name).load("train", corpus=corpus, **options)
        return example

    assert one("docstrings") == "Some prose."
    assert one("docstring_summary") == Example("summarize: The rest.", ("The line.",))
    assert one("code_summary") == Example("summarize code: def f(): ...", ("The line.",))
    example = one("parameter_qa", context_words=1000)
    context = CORPUS_ROWS["parameter_qa"][0]["context"]
    assert example.inputs == f"question: parameter w100 context: {context}"
    assert example.targets == ("w102 w103 w104",)


@pytest.mark.parametrize("begin", [0, 3, 100, 195])
def test_a_cut_context_keeps_the_entry_at_places_that_vary(begin, monkeypatch):
    context = " ".join(f"w{i}" for i in range(200))
    places = set()
    for i in range(50):
        row = {"context": context, "parameter": f"p{i}", "answer": "", "begin": begin}
        row["end"] = begin + 5
        monkeypatch.setitem(CORPUS_ROWS, "parameter_qa", [row])
        rows = SimpleNamespace(rows=lambda task, split: CORPUS_ROWS[task])
        (example,) = tasks.get("parameter_qa").load("train", corpus=rows, context_words=20)
        words = example.inputs.partition("context: ")[2].split()
        assert len(words) == 20
        assert " ".join(f"w{k}" for k in range(begin, begin + 5)) in " ".join(words)
        places.add(words.index(f"w{begin}"))
    assert len(places) > (5 if begin == 100 else 0)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_jsonl_is_read_with_references_and_prefix(write, name):
    assert load(write(name, JSONL), prefix="de-en: ") == [
        Example("de-en: ein Hund", ("a dog",)),
        Example("de-en: zwei", ("two", "2")),
    ]


@pytest.mark.parametrize("name", ["a.tsv", "a.tsv.gz"])
def test_tsv_is_read_by_its_header(write, name):
    assert load(write(name, TSV)) == [Example('ein "Hund', ("a dog",))]
    assert load(write(name, "\ufeff" + TSV.replace("x\t", "", 1).replace("1\t", "", 1)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", JSONL + "{'de': 1}\n", "a.jsonl:4: not JSON: .* at column 2"),
        ("a.jsonl", "[1, 2]\n", "a.jsonl:1: not a JSON object"),
        ("a.jsonl", JSONL + '{"de": "x", "fr": "y"}\n', "a.jsonl:4: no column 'en'; .* de, fr"),
        ("a.jsonl", '{"de": "x", "en": 3}\n', "a.jsonl:1: 'en' must be text or a list of texts"),
        ("a.jsonl", '{"de": "x", "en": []}\n', "a.jsonl:1: .* none empty"),
        ("a.jsonl", '{"de": " ", "en": "y"}\n', "a.jsonl:1: .* none empty"),
        ("a.jsonl.gz", JSONL.encode() + b'{"de": "\xff"}\n', "a.jsonl.gz:4: not UTF-8"),
        ("a.tsv", TSV + "1\tzwei\n", "a.tsv:3: 2 columns, the header has 3"),
        ("a.tsv", "de\tfr\nx\ty\n", "a.tsv:2: no column 'en'; this row has de, fr"),
        ("a.tsv", "de\ten\n", "a.tsv: no rows"),
        ("a.jsonl", "", "a.jsonl: no rows"),
        ("a.tsv", "de\ten\tde\nx\ty\tz\n", "a.tsv:1: the header has 2 columns 'de'"),
        ("a.jsonl", JSONL + "[" * 100_000 + "\n", "a.jsonl:4: JSON nested too deeply"),
        ("a.jsonl", '{"de": ' + "1" * 5000 + "}\n", "a.jsonl:1: .* a number too long"),
        ("a.jsonl", '{"de": "x", "en": "\\ud800"}\n', "a.jsonl:1: .* must be text"),
        ("a.jsonl", '{"de": "x", "e\\nn": "y"}\n', "a.jsonl:1: .* this row has de, e n"),
        ("a.xls", "de,en\n", "a.xls: file name must end in .jsonl, .ndjson, .json, .*.parquet"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(write, name, content, message):
    with pytest.raises(UserError, match=message) as error:
        load(write(name, content))
    assert "\n" not in str(error.value)


def test_unreadable_files_are_named(write, tmp_path):
    with pytest.raises(UserError, match=r"missing\.tsv: No such file"):
        load(str(tmp_path / "missing.tsv"))
    (tmp_path / "folder.tsv").mkdir()
    os.mkfifo(tmp_path / "pipe.tsv")
    for name in ("folder", "pipe"):
        with pytest.raises(UserError, match=rf"{name}\.tsv: is a (folder|device, a pipe)"):
            load(str(tmp_path / f"{name}.tsv"))
    path = write("cut.jsonl.gz", JSONL)
    content = (tmp_path / "cut.jsonl.gz").read_bytes()
    for damaged in (content[:-12], b"not gzip", content[:10] + b"\xff" * 30):
        (tmp_path / "cut.jsonl.gz").write_bytes(damaged)
        with pytest.raises(UserError, match=r"cut\.jsonl\.gz: not a whole \.gz file"):
            load(path)


def test_check_finds_mistakes_in_every_row_of_every_file(write):
    good, bad = write("a.jsonl", JSONL), write("b.tsv", "de\tfr\nx\ty\n")
    held = write("held.jsonl", JSONL.replace('"de": "', '"de": "held '))
    options = {"train": good, "validation": held, "source": "de", "target": "en"}
    tasks.check("files", **options)
    late = write("late.jsonl", JSONL * 40 + "not JSON\n")
    for split in ("train", "validation", "test"):
        with pytest.raises(UserError, match=r"1 of 81 rows are bad: .*late\.jsonl:121: not JSON"):
            tasks.check("files", **options | {split: late})
    tasks.check("parameter_qa", context_words=100)
    for changes, message in [
        ({"test": bad}, "b.tsv:2: no column 'en'"),
        ({"train": ""}, "needs train=PATH"),
        ({"validation": ""}, "needs validation=PATH"),
        ({"source": ""}, "source=NAME"),
        ({"metrics": ("rouge9",)}, "metrics='rouge9' is unknown; choose from rouge1"),
        ({"colour": 1}, "task files has no option 'colour'; its options are source, target, train"),
    ]:
        with pytest.raises(UserError, match=message):
            tasks.check("files", **options | changes)
    with pytest.raises(UserError, match="docstrings has no option 'prefix'; it has none"):
        tasks.check("docstrings", prefix="x")
    with pytest.raises(UserError, match="needs test=PATH"):
        tasks.get("files").load("test", **options)


def test_a_fingerprint_has_all_that_makes_the_text(write):
    path = write("a.jsonl", JSONL)
    options = {"train": path, "source": "de", "target": "en", "prefix": ""}
    changes = [{}, {"source": "x"}, {"target": "x"}, {"prefix": "x: "}, {"train": f"{path}@2"}]
    found = [str(tasks.get("files").fingerprint(**options | change)) for change in changes]
    assert len(set(found)) == len(changes)
    columns = [tasks.get("documents").fingerprint(train=path, column=c) for c in ("de", "en")]
    assert columns[0] != columns[1]


def test_parts_of_a_mixture_keep_their_weights(write):
    a, b = write("a.jsonl", JSONL), write("b.jsonl", JSONL.splitlines()[0])
    train = f"{a}@3,{b}@0.5"
    found = tasks.parts("files", corpus=None, train=train, source="de", target="en", prefix="p ")
    assert [(len(part), weight) for part, weight in found] == [(2, 3.0), (1, 0.5)]
    assert found[1][0] == [Example("p ein Hund", ("a dog",))]
    texts = tasks.parts("documents", corpus=None, train=train, column="de")
    assert texts == [(["ein Hund", "zwei"], 3.0), (["ein Hund"], 0.5)]

"""The paper's datasets, as TFDS itself prepares them: what its builders declare is what is read."""

import json
import shutil
import sys

import numpy as np
import pytest

from gqa.data import batching, tasks
from gqa.data import tfds as tfds_data
from gqa.data.examples import SPLITS, Example
from gqa.runtime.errors import UserError
from tests.support.prepared_datasets import prepare, trivia_row
from tests.support.spans import restore

DIALOGUE = {"program": "", "date": "", "url": "", "summary": "They talk.", "utt": ["Hi.", "Ä!"]}


def c4_row(i):
    named = {"content-length": "9", "content-type": "text/plain", "timestamp": "", "url": str(i)}
    return named | {"text": " ".join(f"w{i}" for _ in range(1 + i % 5))}


def paper_row(i):
    return {"article": "x" * 40_000 if i else "Text.", "abstract": "Short.", "section_names": ""}


SUMMARY = ("rouge1", "rouge2", "rougeL")
# Name in TFDS; its rows; the first example they give; lengths and headline of the paper.
DATASETS = {
    "cnn_dailymail": (
        "cnn_dailymail",
        lambda i: {"article": "Ä.\nB.", "highlights": "A .\nB .", "publisher": "", "id": str(i)},
        Example("summarize: Ä.\nB.", ("A .\nB .",)),
        ((512, 256), SUMMARY, "rouge1"),
    ),
    "arxiv": (
        "scientific_papers/arxiv",
        paper_row,
        Example("summarize: Text.", ("Short.",)),
        ((2048, 512), SUMMARY, "rouge1"),
    ),
    "pubmed": (
        "scientific_papers/pubmed",
        paper_row,
        Example("summarize: Text.", ("Short.",)),
        ((2048, 512), SUMMARY, "rouge1"),
    ),
    "media_sum": (
        "media_sum",
        lambda i: DIALOGUE | {"id": str(i), "speaker": [] if i else ["A", "B"]},
        Example("summarize: A: Hi.\nB: Ä!", ("They talk.",)),
        ((2048, 512), SUMMARY, "rouge1"),
    ),
    "multi_news": (
        "multi_news",
        lambda i: {"document": "One. ||||| Two." if i < 2 else " ", "summary": "All."},
        Example("summarize: One. ||||| Two.", ("All.",)),
        ((2048, 512), SUMMARY, "rouge1"),
    ),
    "wmt14_en_de": (
        "wmt14_translate/de-en",
        lambda i: {"de": "Tür", "en": "door"},
        Example("translate English to German: door", ("Tür",)),
        ((512, 256), ("bleu",), "bleu"),
    ),
    "trivia_qa": (
        "trivia_qa/rc",
        trivia_row,
        Example("question: Where? context: One. Two.", ("Bonn", "Bonna")),
        ((2048, 32), ("f1", "exact_match"), "f1"),
    ),
    "c4": ("c4/en", c4_row, "w0", ((512, 256), None, None)),
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """All of them with three rows a split."""
    folder = tmp_path_factory.mktemp("tfds")
    splits = {"media_sum": ("train", "val", "test"), "c4": ("train", "validation")}
    for task, (name, row, _, _) in DATASETS.items():
        prepare(folder, name, row, splits=splits.get(task, SPLITS))
    return str(folder)


@pytest.mark.parametrize("name", DATASETS)
def test_each_is_read_as_the_paper_has_it(data_dir, name):
    _, _, example, (lengths, metrics, headline) = DATASETS[name]
    task = tasks.get(name)
    assert tasks.check(name, data_dir=data_dir) == []
    for split in getattr(task, "SPLITS", SPLITS):
        found = list(task.load(split, data_dir=data_dir))
        assert example in found
        assert len(found) == (2 if name == "multi_news" else 3)  # one has no text
    if metrics:
        assert tasks.scoring(name) == (metrics, headline)
    assert getattr(task, "LENGTHS", tasks.LENGTHS) == lengths
    assert not tasks.needs_corpus(name)
    assert "tensorflow" not in sys.modules


def test_inputs_are_cut_where_nothing_more_is_read(data_dir):
    lengths = {
        len(example.inputs) for example in tasks.get("arxiv").load("test", data_dir=data_dir)
    }
    assert max(lengths) == tfds_data.CHARACTERS
    inputs = {example.inputs for example in tasks.get("media_sum").load("test", data_dir=data_dir)}
    assert "summarize: Hi.\nÄ!" in inputs
    inputs = {example.inputs for example in tasks.get("trivia_qa").load("train", data_dir=data_dir)}
    assert "question: Where? context: One. Two. Three." in inputs


def test_trivia_qa_has_no_answers_for_its_test_split():
    assert tasks.get("trivia_qa").SPLITS == ("train", "validation")


@pytest.mark.parametrize("name", DATASETS)
def test_what_is_missing_is_told_with_the_command_that_prepares_it(tmp_path, name):
    command = rf"run: tfds build {DATASETS[name][0]} --data_dir={tmp_path} --file_format=array_rec"
    with pytest.raises(UserError, match=f"{DATASETS[name][0]}: not prepared; .*{command}"):
        tasks.check(name, data_dir=str(tmp_path))


def test_the_newest_version_is_read_and_known_again(data_dir, tmp_path):
    parent = tmp_path / "multi_news"
    shutil.copytree(f"{data_dir}/multi_news", parent)
    for version in ("2.0.0", "10.0.0", "11.0.0.incomplete"):
        shutil.copytree(parent / "2.1.0", parent / version)
    (parent / "12.0.0").mkdir()
    assert tfds_data.find("multi_news", str(tmp_path)).name == "10.0.0"
    shutil.rmtree(parent / "10.0.0")
    assert tfds_data.find("multi_news", str(tmp_path)).name == "2.1.0"
    fingerprint = tasks.get("multi_news").fingerprint
    assert fingerprint(data_dir=str(tmp_path)) == fingerprint(data_dir=data_dir)
    json.dumps(fingerprint(data_dir=data_dir))
    assert fingerprint(data_dir=data_dir) != tasks.get("arxiv").fingerprint(data_dir=data_dir)


def test_a_fingerprint_has_the_version_and_the_sizes(data_dir, tmp_path):
    fingerprint = tasks.get("multi_news").fingerprint
    prepare(tmp_path / "larger", "multi_news", DATASETS["multi_news"][1], size=4)
    larger = fingerprint(data_dir=str(tmp_path / "larger"))
    assert larger != fingerprint(data_dir=data_dir)
    assert larger[:2] == fingerprint(data_dir=data_dir)[:2]

    # The same records under another version.
    folder = tmp_path / "newer" / "multi_news" / "10.0.0"
    shutil.copytree(f"{data_dir}/multi_news/2.1.0", folder)
    change(folder / "dataset_info.json", '"2.1.0"', '"10.0.0"')
    newer = fingerprint(data_dir=str(tmp_path / "newer"))
    assert newer != fingerprint(data_dir=data_dir)
    assert newer[2] == fingerprint(data_dir=data_dir)[2]


def test_examples_without_a_target_are_left_out(tmp_path):
    name, row, *_ = DATASETS["cnn_dailymail"]
    prepare(tmp_path, name, lambda i: row(i) | ({"highlights": " "} if i == 1 else {}))
    examples = tasks.get("cnn_dailymail").load("train", data_dir=str(tmp_path))
    assert [example.targets for example in examples] == [("A .\nB .",)] * 2


def use(name, data_dir):
    tasks.check(name, data_dir=data_dir)
    tasks.get(name).load("train", data_dir=data_dir)


def change(path, old, new):
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new))


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (
            "dataset_info.json",
            '"array_record"',
            '"tfrecord"',
            "prepared as tfrecord; .* --overwrite",
        ),
        ("dataset_info.json", '"name": "validation"', '"name": "dev"', "no rows in split 'valid"),
        ("dataset_info.json", "{DATASET}-{SPLIT}", "../x/{DATASET}-{SPLIT}", "x/.* is not in it"),
        ("dataset_info.json", "{DATASET}-{SPLIT}", "/x/{DATASET}-{SPLIT}", "is not in it"),
        ("dataset_info.json", '"splits"', '"slits"', "not what TFDS writes"),
        ("dataset_info.json", "{", "[", "dataset_info.json: not what TFDS writes"),
        ("dataset_info.json", '"3"', '"4"', "damaged"),
        (
            "features.json",
            "tensorflow_datasets.core.features.text",
            "os.text",
            "os.text.* no feature",
        ),
        ("features.json", "text_feature.Text", "text_feature.Txt", "Txt is no feature"),
        ("features.json", '"document"', '"text"', "not the features of multi_news: 'document'"),
        ("features.json", "{", "{" * 9, "features.json: not what TFDS writes"),
    ],
)
def test_metadata_that_leads_elsewhere_is_refused(data_dir, tmp_path, file, old, new, message):
    shutil.copytree(f"{data_dir}/multi_news", tmp_path / "multi_news")
    shutil.copytree(f"{data_dir}/multi_news/2.1.0", tmp_path / "multi_news" / "x")
    change(tmp_path / "multi_news" / "2.1.0" / file, old, new)
    with pytest.raises(UserError, match=message):
        use("multi_news", str(tmp_path))


def test_missing_and_damaged_records_are_refused(data_dir, tmp_path):
    shutil.copytree(f"{data_dir}/multi_news", tmp_path / "multi_news")
    (path,) = (tmp_path / "multi_news" / "2.1.0").glob("*train*")
    content = path.read_bytes()
    for damaged in (b"", content[:100], bytes(len(content)), content[:-200]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"multi_news/2\.1\.0: .*damaged"):
            tasks.get("multi_news").load("train", data_dir=str(tmp_path))
    path.unlink()
    with pytest.raises(
        UserError, match=r"multi_news-train.* is not in it; .* tfds build multi_new"
    ):
        tasks.check("multi_news", data_dir=str(tmp_path))


def test_c4_is_read_as_it_is_needed(tmp_path, monkeypatch):
    prepare(tmp_path, "c4/en", c4_row, size=40, splits=("train", "validation"))
    rows = tfds_data.records("c4/en", str(tmp_path), "train")
    assert rows[1:3] == [rows[1], rows[2]]
    reads = []
    get = tfds_data.Records.__getitem__
    monkeypatch.setattr(
        tfds_data.Records, "__getitem__", lambda self, i: reads.append(i) or get(self, i)
    )
    documents = tasks.get("c4").load("train", data_dir=str(tmp_path))
    assert len(documents) == 40
    assert not reads
    assert list(documents[:3]) == [documents[i] for i in range(3)]
    monkeypatch.setattr(tasks.get("c4"), "VALIDATION", 7)
    assert len(tasks.get("c4").load("validation", data_dir=str(tmp_path))) == 7

    def encode(text):
        return [100 + int(word[1:]) for word in text.split()]

    options = {
        "inputs_length": 43,
        "batch_size": 2,
        "seed": 3,
        "sentinels": np.arange(32099, 31999, -1),
    }
    batch = next(batching.streamed_pretraining_batches(documents, encode, **options))
    for inputs, targets in zip(batch["inputs"], batch["targets"], strict=True):
        words = restore(inputs, targets, 32099)
        assert len(words) == 47
        assert set(words) <= set(range(100, 140))
    assert np.unique(batch["inputs"]).size > 5


def hostile_features(place):
    """A features.json whose names are TFDS's own, but for one inside a text that is JSON."""
    evil = {"pythonClassName": "evil_module.Feature", "jsonFeature": {"json": "{}"}}
    sequence = "tensorflow_datasets.core.features.sequence_feature.Sequence"
    inner = {
        "present": {"feature": evil, "length": 3},
        "former": {"feature": {"type": "evil_module.Feature", "content": "{}"}, "length": 3},
        "snake": {"feature": {"python_class_name": "evil_module.Feature"}, "length": 3},
    }[place]
    once = {"pythonClassName": sequence, "jsonFeature": {"json": json.dumps(inner)}}
    twice = {"pythonClassName": sequence, "jsonFeature": {"json": json.dumps({"feature": once})}}
    return [once, twice, {"type": sequence, "content": inner}]


@pytest.mark.parametrize("depth", range(3))
@pytest.mark.parametrize("place", ["present", "former", "snake"])
def test_no_class_is_imported_that_a_text_inside_a_feature_names(
    data_dir, tmp_path, monkeypatch, place, depth
):
    shutil.copytree(f"{data_dir}/multi_news", tmp_path / "multi_news")
    (tmp_path / "evil_module.py").write_text("raise SystemExit('code ran')")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "multi_news" / "2.1.0" / "features.json"
    path.write_text(json.dumps(hostile_features(place)[depth]))
    with pytest.raises(UserError, match=r"features\.json: evil_module\.Feature is no feature of"):
        use("multi_news", str(tmp_path))


def test_features_that_are_nested_too_deeply_are_refused(data_dir, tmp_path):
    shutil.copytree(f"{data_dir}/multi_news", tmp_path / "multi_news")
    path = tmp_path / "multi_news" / "2.1.0" / "features.json"
    path.write_text(json.dumps({"content": '{"a":' * 50_000 + "1" + "}" * 50_000}))
    with pytest.raises(UserError, match=r"features\.json: not what TFDS writes: nested too deeply"):
        use("multi_news", str(tmp_path))


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        ({"pythonClassName": f"{tfds_data.FEATURES}video_feature.Video"}, "Video is no feature"),
        (
            # Its labels are in a file beside it, which may be a link to a device.
            {
                "pythonClassName": f"{tfds_data.FEATURES}class_label_feature.ClassLabel",
                "classLabel": {"numClasses": "2"},
            },
            "ClassLabel is no feature",
        ),
        (
            {
                "pythonClassName": f"{tfds_data.FEATURES}tensor_feature.Tensor",
                "tensor": {"shape": {}, "dtype": "string", "encoding": "zlib"},
            },
            "encoding zlib is no feature",
        ),
    ],
)
def test_features_that_are_neither_text_nor_numbers_are_refused(
    data_dir, tmp_path, feature, message
):
    shutil.copytree(f"{data_dir}/multi_news", tmp_path / "multi_news")
    path = tmp_path / "multi_news" / "2.1.0" / "features.json"
    content = json.loads(path.read_text())
    content["featuresDict"]["features"]["document"] = feature
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"features\.json: .*{message}"):
        use("multi_news", str(tmp_path))


def test_a_description_without_any_of_its_fields_is_read_or_refused(tmp_path):
    """Without its name, for example, no file of the dataset has a name."""
    prepare(tmp_path, "trivia_qa/rc", trivia_row, splits=("train",))
    (path,) = tmp_path.rglob("dataset_info.json")
    info, refused = json.loads(path.read_bytes()), {}
    for key in info:
        path.write_text(json.dumps({k: value for k, value in info.items() if k != key}))
        try:
            assert len(tfds_data.records("trivia_qa/rc", str(tmp_path), "train")) == 3
        except UserError as error:
            refused[key] = str(error)
    assert {"name", "splits"} <= {*refused} < {*info}
    assert not any("\n" in message for message in refused.values())

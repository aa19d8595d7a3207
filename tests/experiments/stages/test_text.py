"""From a config's names to batches: the user's files and the paper's datasets."""

import json
import multiprocessing

import numpy as np
import pytest

from configs import base
from experiments.graph import plan, validate
from experiments.stages import text
from gqa.data import corpus, lexicon, tasks, tokenizer
from gqa.runtime.errors import UserError
from tests.data.test_tfds import DATASETS, c4_row, prepare

ROWS = [{"q": f"frage {i}", "answers": {"text": [f"antwort {i}", "x"]}} for i in range(150)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A place with files, text and a vocabulary, and the paths as they are typed in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parts").mkdir()
    for i in range(3):
        write(tmp_path / "parts" / f"{i}.jsonl", ROWS[50 * i : 50 * i + 50])
    (tmp_path / "held").mkdir()
    write(tmp_path / "held" / "all.jsonl", ROWS)
    paragraphs = [" ".join(f"w{i * k % 97}" for k in range(60)) for i in range(60)]
    (tmp_path / "text.txt").write_text("\n\n".join(paragraphs))
    held = [" ".join(reversed(paragraph.split())) for paragraph in paragraphs]
    (tmp_path / "held.txt").write_text("\n\n".join(held))
    tokenizer.train([*paragraphs, *map(str, ROWS)], 500, tmp_path / "small.model")
    return tmp_path


def make_config(size="nano", **changes):
    config = base.get_config(size)
    changes = {"model.vocab_size": 4096, "text.vocabulary": "small.model"} | {
        name.replace("__", "."): value for name, value in changes.items()
    }
    config.update_from_flattened_dict(changes)
    return config


def own(**changes):
    files = {"train": "parts/[01].jsonl", "validation": "parts/2.jsonl", "test": "held"}
    files |= {"source": "frage: {q}", "target": "answers.text", "prefix": "qa ", "metrics": "f1"}
    documents = {"train": "text.txt", "validation": "held.txt"}
    options = {f"files.{key}": value for key, value in files.items()}
    options |= {f"documents.{key}": value for key, value in documents.items()}
    options |= {"finetune.tasks": "files", "pretrain.task": "documents"}
    return make_config(**options | changes)


ROUNDS = 10


def prepare_in_rounds(config, work, barrier, queue):
    """Make vocabulary and token ids again and again, each time together with the other process."""
    results = []
    for i in range(ROUNDS):
        barrier.wait(60)
        prepared = text.prepare(text.settings(config), work / str(i))
        ids = prepared.ids(prepared.examples("documents", "train"))
        pairs = prepared.pairs(prepared.examples("files", "train"))
        tokens = [*ids, *(side for pair in pairs for side in pair)]
        results.append((prepared.tokenizer.hash, [token.tolist() for token in tokens]))
    queue.put(results)


def test_two_processes_may_prepare_the_same_text_at_once(folder):
    """As the jobs of a cluster do in one workdir: nobody reads what another has half written."""
    config = own(**{"text.vocabulary": "", "model.vocab_size": 640})
    validate.check_text(config)
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(2), context.Queue()
    arguments = (config, folder / "work", barrier, queue)
    processes = [context.Process(target=prepare_in_rounds, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    first, second = (queue.get(timeout=100) for _ in processes)
    for process in processes:
        process.join()

    assert first == second
    assert all(result == first[0] for result in first)
    assert not list((folder / "work").rglob("*.tmp"))
    for i in range(ROUNDS):
        names = sorted(path.name[:6] for path in (folder / "work" / str(i)).rglob("*.*"))
        assert names == ["tokens"] * 3 + ["vocabu"]


def test_own_files_and_text_become_batches(folder):
    config = own(**{"pretrain.inputs_length": 43, "finetune.inputs_length": 20})
    validate.check_text(config)
    prepared = text.prepare(text.settings(config), folder / "work")
    assert prepared.corpus is None
    assert [len(prepared.examples("files", s)) for s in ("train", "validation", "test")] == [
        100,
        50,
        150,
    ]
    first = prepared.examples("files", "train")[0]
    assert first == ("qa frage: frage 0", ("antwort 0", "x"))
    assert prepared.metrics("files") == ["f1"]
    tuning = text.training(prepared, plan.finetune_recipe(config, "files"))
    assert next(tuning.batches)["inputs"].shape == (8, 20)
    assert tuning.validation_size == 50
    pretraining = text.training(prepared, plan.pretrain_recipe(config))
    assert next(pretraining.batches)["inputs"].shape == (8, 43)


def test_a_text_that_changes_after_the_plan_is_not_read(folder):
    """Rows of the same size, written at once: neither size nor a coarse clock tells them apart."""
    config = own()
    prepared = text.prepare(text.settings(config), folder / "work")
    promised = {f"{t}/training": prepared.training_source(t) for t in ("files", "documents")}
    promised |= {"files/test": prepared.source("files")}
    planned = prepared._replace(promised=promised)
    assert len(planned.examples("files", "validation")) == 50

    old = (folder / "parts" / "2.jsonl").read_text()
    (folder / "parts" / "2.jsonl").write_text(old.replace("antwort", "anxwort"))
    with pytest.raises(UserError, match="the text of task files has changed since"):
        planned.examples("files", "test")
    with pytest.raises(UserError, match="the text of task files has changed since"):
        planned.parts("files")
    assert planned.parts("documents")

    (folder / "parts" / "2.jsonl").write_text(old)
    write(folder / "test.jsonl", ROWS[1:])
    more = own(**{"files.test": "test.jsonl"})
    prepared = text.prepare(text.settings(more), folder / "work")
    assert prepared.training_source("files") == promised["files/training"]
    assert prepared.source("files") != promised["files/test"]
    assert len(planned.examples("files", "test")) == 150


def test_a_text_that_changes_while_it_is_read_is_refused(folder, monkeypatch):
    config = own()
    prepared = text.prepare(text.settings(config), folder / "work")
    planned = prepared._replace(promised={"files/training": prepared.training_source("files")})
    read = tasks.get("files").load

    def replace_and_read(split, *, corpus=None, **options):
        write(folder / "parts" / "1.jsonl", ROWS[:50])
        return read(split, **options)

    monkeypatch.setattr(tasks.get("files"), "load", replace_and_read)
    with pytest.raises(UserError, match="the text of task files has changed since"):
        planned.examples("files", "train")


def test_a_corpus_that_changes_after_the_plan_is_not_read(tmp_path):
    built = corpus.build(tmp_path / "corpus", ["absl-py", "opt_einsum", "optax", "rich"])
    prepared = text.Text(None, built, {}, tmp_path)
    assert prepared.source("docstrings") == built.manifest["sha256"]
    planned = prepared._replace(promised={"docstrings/test": prepared.source("docstrings")})
    assert planned.examples("docstrings", "test")
    corpus.build(tmp_path / "corpus", ["opt_einsum", "optax", "rich"])
    with pytest.raises(UserError, match="the text of task docstrings has changed since"):
        planned.examples("docstrings", "test")


def test_bad_rows_are_told_and_many_refused(folder, capsys):
    new = {"q": "frage", "answers": {"text": ["antwort"]}}  # another row than all of files.test
    write(folder / "b.jsonl", [new, *ROWS[1:], {"q": 3}])
    validate.check_text(own(**{"files.train": "b.jsonl"}))
    said = capsys.readouterr().out
    assert f"task files: 1 of 151 rows are bad: {folder}/b.jsonl:151: " in said
    assert "task files: 149 of 150 rows of test are rows of train, too; scores should be of" in said
    write(folder / "c.jsonl", [*ROWS, {"q": 3}, *[{"a": i} for i in range(5)]])
    with pytest.raises(UserError, match=r"6 of 156 rows are bad: .*c\.jsonl:151: .*at most 1%"):
        validate.check_text(own(**{"files.test": "c.jsonl"}))


def test_a_mixture_is_trained_on_by_its_weights(folder):
    config = own(**{"files.train": "parts/0.jsonl@3,parts/1.jsonl@1", "finetune.pack": False})
    prepared = text.prepare(text.settings(config), folder / "work")
    batches = text.training(prepared, plan.finetune_recipe(config, "files")).batches
    rows = np.concatenate([next(batches)["inputs"] for _ in range(20)])
    read = [int(prepared.tokenizer.decode(row).split()[-1]) for row in rows]
    assert np.mean(np.array(read) < 50) == pytest.approx(0.75, abs=0.01)
    other = own(**{"files.train": "parts/0.jsonl@2,parts/1.jsonl@1"})
    other = text.prepare(text.settings(other), folder / "work")
    assert prepared.source("files") != other.source("files")
    assert prepared.source("documents") == other.source("documents")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"documents.train": ""}, "task documents needs train=PATH and validation=PATH"),
        ({"documents.validation": "none"}, "none: file name must end in"),
        ({"documents.train": "text.txt@1"}, None),
        ({"documents.train": "parts"}, "no column 'text'; this row has q, answers"),
        ({"files.train": "z*"}, r"z\*: matches no file"),
        ({"files.train": "parts@2,text.txt"}, "for all of them or none"),
        ({"files.target": "answers.start"}, "no column 'answers.start'"),
        ({"finetune.tasks": "documents"}, "finetune.tasks: documents has documents, not examples"),
        (
            {"finetune.tasks": "trivia_qa", "text.data_dir": "."},
            "trivia_qa/rc: not prepared; .* run",
        ),
        ({"finetune.tasks": "c4", "text.data_dir": "."}, "c4/en: not prepared; .* run: tfds build"),
    ],
)
def test_what_cannot_be_read_is_refused(folder, changes, message):
    if message is None:
        validate.check_text(own(**changes))
    else:
        with pytest.raises(UserError, match=message):
            validate.check_text(own(**changes))


def test_an_answerless_split_is_refused(folder):
    name, row, _, _ = DATASETS["trivia_qa"]
    prepare(folder / "tfds", name, row)
    options = {"finetune.tasks": "trivia_qa", "text.data_dir": "tfds"}
    validate.check_text(own(**options, **{"evaluate.split": "validation"}))
    with pytest.raises(
        UserError, match=r"evaluate\.split='test': trivia_qa has no answers in it; use"
    ):
        validate.check_text(own(**options))


def test_c4_is_trained_on_as_a_stream(folder):
    prepare(folder / "tfds", "c4/en", c4_row, size=40, splits=("train", "validation"))
    options = {"pretrain.task": "c4", "text.data_dir": "tfds", "pretrain.inputs_length": 43}
    config = own(**options)
    validate.check_text(config)
    wanted = text.settings(config)
    prepared = text.prepare(wanted, folder / "work")
    assert len(prepared.source("c4")) == 64
    made = text.training(prepared, plan.pretrain_recipe(config))
    assert next(made.batches)["inputs"].shape == (8, 43)
    assert made.validation_size > 0
    config.text.vocabulary, config.model.vocab_size = "", 460
    text.prepare(text.settings(config), folder / "work")  # a vocabulary of the documents


def recipes(config):
    """The recipes of the fine-tunings that a config plans."""
    return [s.settings.recipe for s in plan.plan(config, None) if s.kind == "finetune"]


def test_the_vocabulary_suits_the_task_unless_the_config_says_otherwise(folder):
    def shape(**changes):
        config = base.get_config("nano")
        config.update_from_flattened_dict(changes)
        wanted = text.settings(config)
        rows = plan.parent_config(config).vocab_size
        assert rows == changes.get("model.vocab_size") or rows % 16 == 0
        assert 0 <= rows - wanted.vocab_size < 16
        return wanted.vocabulary_model, wanted.vocab_size

    words, prose = lexicon.VOCABULARY, tasks.VOCABULARY
    assert shape() == (words.model_type, words.vocab_size)
    assert shape(**{"pretrain.task": "documents"}) == (prose.model_type, prose.vocab_size)
    assert shape(**{"text.vocabulary_model": "unigram", "model.vocab_size": 700}) == (
        "unigram",
        700,
    )
    # A file has as many ids as it has, whatever the task is.
    given = {"text.vocabulary": str(folder / "small.model")}
    assert shape(**given) == (words.model_type, 500)


def test_large_sizes_have_the_lengths_of_the_paper():
    config = make_config(
        "large",
        text__vocabulary="",
        finetune__tasks="trivia_qa,arxiv,cnn_dailymail,parameter_qa",
    )
    lengths = {
        recipe.task: (recipe.inputs_length, recipe.targets_length) for recipe in recipes(config)
    }
    assert lengths.pop("trivia_qa") == (2048, 32)
    assert lengths.pop("arxiv") == (2048, 512)
    assert set(lengths.values()) == {(512, 256)}
    config.finetune.inputs_length = 99
    assert {recipe.inputs_length for recipe in recipes(config)} == {99}
    assert {recipe.targets_length for recipe in recipes(config)} == {32, 512, 256}
    small = make_config("nano", text__vocabulary="", finetune__tasks="trivia_qa")
    assert {(r.inputs_length, r.targets_length) for r in recipes(small)} == {(80, 64)}


def test_the_share_of_texts_that_are_cut_is_said_with_its_key(folder, capsys):
    config = own(**{"finetune.inputs_length": 8, "finetune.targets_length": 60})
    prepared = text.prepare(text.settings(config), folder / "work")
    text.training(prepared, plan.finetune_recipe(config, "files"), "finetune")
    inputs = [inputs for inputs, _ in prepared.pairs(prepared.examples("files", "train"))]
    share = 100 * np.mean([len(row) > 7 for row in inputs])
    assert capsys.readouterr().out == (
        f"task files: {share:.1f}% of the training inputs are cut to 8 tokens; raise "
        "finetune.inputs_length to keep them whole\n"
    )
    assert share > 0
    text.training(prepared, plan.finetune_recipe(own(), "files"), "finetune")
    assert "are cut" not in capsys.readouterr().out

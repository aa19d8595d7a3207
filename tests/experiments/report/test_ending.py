"""The text at the end of a run: examples beside their references, and commands that work."""

import shlex

from experiments.report import ending
from experiments.report.summary import Summary
from experiments.stages.folder import Outcome, StageFolder
from tests.support.made_results import KEY, PARENT, record, score, variant

GQA = variant(8)


def predicted(settings, task, texts, targets=("h ə l oʊ", "h ɛ l oʊ")):
    """Records of predictions, all of one input."""
    more = {"inputs": f"{task}: hello", "targets": list(targets)}
    records = [
        record(settings, "evaluate", "prediction", 1.0, task=task, example=i, prediction=t, **more)
        for i, t in enumerate(texts)
    ]
    return [score(settings, "parameter_qa", 20.0) | {"task": task}, *records]


def shown(*records):
    return ending.examples(Summary([r for some in records for r in some]), 1.0)


def test_words_stand_beside_their_reference_with_their_differences_marked():
    found = shown(
        predicted(PARENT, "en", ["h ɛ l oʊ"]), predicted(GQA, "en", ["h ə ɹ"])
    ).splitlines()
    assert found[2:] == [
        "en: hello",
        "  reference                 h ə l oʊ",
        "  MHA                     = h ɛ l oʊ",
        "  GQA-8 mean, alpha 0.05    h ə [ɹ]",
    ]


def test_equal_texts_take_one_line_and_further_examples_are_those_that_differ():
    own = ["h ə l oʊ"] * 6 + ["h", "l"]
    found = shown(predicted(PARENT, "en", own), predicted(GQA, "en", [*own[:7], "h ə l"]))
    assert found.count("  all 2 networks          = h ə l oʊ") == 5
    last = found.split("on which they differ")[1].splitlines()[2:]
    assert last == [
        "en: hello",
        "  reference                 h ə l oʊ",
        "  MHA                       [] l []",
        "  GQA-8 mean, alpha 0.05    h ə l []",
    ]


def test_what_is_missing_leaves_empty_brackets_and_insertions_stand_in_them():
    found = shown(predicted(PARENT, "en", ["h l oʊ", "h ə l l oʊ"]))
    assert "h [] l oʊ" in found
    assert "h ə [l] l oʊ" in found or "h ə l [l] oʊ" in found


def test_tasks_take_turns_and_five_examples_are_shown():
    found = shown(*(predicted(PARENT, task, ["h"] * 4) for task in ("en", "de", "fr")))
    inputs = [line[:2] for line in found.splitlines() if line.endswith("hello")]
    assert inputs == ["en", "de", "fr", "en", "de"]


def test_of_long_texts_one_is_shown_cut_to_a_line():
    found = shown(predicted(PARENT, "en", ["a b " * 50] * 4, targets=["word " * 30]))
    assert found.count("hello") == 1
    assert max(map(len, found.splitlines())) == 100
    assert "…" in found


def test_hidden_characters_of_predictions_are_shown_as_numbers():
    found = shown(predicted(PARENT, "en", ["h \u202e x\nnext"]))
    assert "<U+202E>" in found
    assert "\u202e" not in found


def test_no_predictions_are_no_section():
    assert shown([score(PARENT, "parameter_qa", 20.0)]) == ""


def finetuned(settings, key):
    own = record(settings, "finetune", "validation_loss", 2.0, task="en")
    return [own | {"stage_key": key}]


def test_commands_name_the_checkpoints_that_were_scored(tmp_path):
    workdir = tmp_path / "my runs"
    for key in ("aa", "bb"):
        folder = StageFolder.of(workdir, "finetune", key)
        (folder.checkpoints / "20").mkdir(parents=True)
        folder.write_outcome(Outcome([], "20"))
    records = [*predicted(PARENT, "en", ["h"]), *predicted(GQA, "en", ["h"])]
    records += [*finetuned(PARENT, "aa"), *finetuned(GQA, "bb")]
    summary = Summary(records)
    text = ending.text(summary, 1.0, workdir, tmp_path)
    assert f"report: {tmp_path / 'report.md'}" in text
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("    ")]
    stages = workdir / "stages"
    python = commands[0][0]  # "python", or that of an environment below the current folder
    assert python.endswith("python")
    assert commands == [
        [python, "-m", "gqa", "generate"]
        + [str(stages / f"finetune-{key}" / "checkpoints" / "20") for key in ("aa", "bb")]
        + ["en: hello"],
        [python, "launch.py", "--config=configs/gqa.py:kv_heads=4", f"--workdir={workdir}"],
        [python, "launch.py", "--config=configs/sweeps/groups.py", f"--workdir={workdir}"],
    ]

    # A folder that is gone or damaged has no command.
    (stages / "finetune-bb" / "done.json").write_text("{")
    assert "generate" not in ending.text(summary, 1.0, workdir, tmp_path)
    assert KEY not in text

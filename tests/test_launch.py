"""A user's mistake gives one line, status 2, and nothing on disk; configs are what they say."""

import re
from pathlib import Path

import pytest

import launch
from experiments.stages import text

ROOT = Path(launch.__file__).parent
GQA8 = "--config=configs/gqa8.py"
DOCSTRINGS = "--config=configs/docstrings.py"
SPEED = "--config=configs/sweeps/speed.py"


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Run the command in this process; returns its status and what it said on stderr."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(text, "prepare", lambda *_: pytest.fail("the job began"))

    def main(*arguments):
        status = launch.main(["launch.py", f"--workdir={tmp_path}/runs", *arguments])
        return status, capsys.readouterr().err

    return main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--config is missing"),
        (("--config=configs/nothing.py",), "configs/nothing.py"),
        (
            (GQA8, "--config.uptrain.alhpa=0.1"),
            '^error: --config.uptrain.alhpa is no key; Did you mean "alpha"',
        ),
        ((GQA8, "--noconfig.nope.x"), "^error: --config.nope.x is no key; configs/base.py lists"),
        ((GQA8, "--config.uptrain.alpha=lots"), "uptrain.alpha"),
        ((GQA8, "--config.uptrain.alpha=1.5"), "uptrain.alpha=1.5; use a fraction from 0 to 1"),
        ((GQA8, "--workdri=x"), "workdri"),
        ((GQA8, "extra"), "unexpected argument 'extra'"),
        (("--config=configs/gqa8.py:medium",), "size='medium'; use one of pico, nano, mini, small"),
        (
            ("--config=configs/gqa8.py:small",),
            "num_kv_heads_self_attention=8 .* use one of 1, 2, 3, 6",
        ),
        (
            ("--config=configs/gqa.py:kv_heads=3",),
            "=3 does not divide .* use one of 1, 2, 4, 8, 16",
        ),
        (("--config=configs/gqa.py:heads=4",), "config argument 'heads=4'"),
        (
            (GQA8, "--config.evaluate.search=best"),
            "evaluate.search='best'; use one of greedy, beam, sample",
        ),
        ((GQA8, "--config.evaluate.top_p=0"), "evaluate.top_p=0.0; use more than 0 and at most 1"),
        ((GQA8, "--config.evaluate.top_k=-1"), "evaluate.top_k=-1; use a whole number, 0 or more"),
        (
            (GQA8, "--config.evaluate.num_beams=0"),
            "evaluate.num_beams=0; use a whole number, 1 or more",
        ),
        (
            (GQA8, "--config.evaluate.length_penalty=-1"),
            "evaluate.length_penalty=-1.0; use 0 or more",
        ),
        (
            (GQA8, "--config.evaluate.cache_dtype=float16"),
            "evaluate.cache_dtype='float16'; use one of nothing, float32, bfloat16",
        ),
        ((GQA8, "--config.convert.num_kv_heads_encoder=5"), "num_kv_heads_encoder=5"),
        ((GQA8, "--config.convert.method=median"), "convert.method='median'; use one of mean"),
        (
            (GQA8, "--config.convert.method=none", "--config.convert.num_kv_heads_encoder=5"),
            "convert.num_kv_heads_encoder=5 does not divide",
        ),
        (
            (GQA8, "--config.convert.where=encoder"),
            "where='encoder'; use one of self_attention, cross_attention, both",
        ),
        (
            (GQA8, "--config.convert.optimizer=keep"),
            "convert.optimizer='keep'; use one of map, reset",
        ),
        ((GQA8, "--config.model.remat=some"), "model.remat='some'; use one of none, minimal, full"),
        ((GQA8, "--config.model.activation=swish"), "model.activation='swish'"),
        ((GQA8, "--config.finetune.dropout_rate=1.0"), "dropout_rate=1.0; use a value in"),
        (
            (GQA8, "--config.pretrain.batch_size=6", "--config.pretrain.num_microbatches=4"),
            "pretrain.batch_size=6 does not split over num_microbatches=4; use a multiple of 4",
        ),
        ((GQA8, "--config.finetune.every=0"), "finetune.every=0; use a whole number, 1 or more"),
        ((GQA8, "--config.pretrain.steps=0"), "pretrain.steps=0; use a whole number, 1 or more"),
        ((GQA8, "--config.model.d_ff=-1"), "model.d_ff=-1; use a whole number, 1 or more"),
        ((GQA8, "--config.finetune.learning_rate=-0.1"), "learning_rate=-0.1; use 0 or more"),
        ((GQA8, "--config.pretrain.scale=nan"), "pretrain.scale=nan; use 0 or more"),
        (
            (GQA8, "--config.pretrain.task=docstrings", "--config.pretrain.inputs_length=2"),
            "inputs_length=2",
        ),
        ((GQA8, "--config.evaluate.split=dev"), "evaluate.split='dev'; use one of train"),
        ((GQA8, "--workdir=README.md"), "--workdir='README.md' cannot be used: "),
        ((GQA8, "--config.finetune.tasks=squad"), "task='squad' is unknown; choose from"),
        (
            (GQA8, "--config.convert.method=fuse", "--config.convert.per_layer_budget=True"),
            "convert.method='fuse' does not go with KV heads by layer",
        ),
        ((GQA8, "--config.finetune.tasks=docstrings"), "docstrings has documents"),
        ((GQA8, "--config.finetune.tasks=files"), "task files needs train=PATH"),
        ((GQA8, "--config.finetune.tasks=files", "--config.files.train=no.tsv"), "no.tsv"),
        ((GQA8, "--config.text.vocabulary=no.model"), "vocabulary .*no.model: No such file"),
        ((DOCSTRINGS, "--config.text.packages=nothing-like-it"), "nothing-like-it"),
        ((GQA8, "--stage=train"), "--stage=train; use one of pretrain, convert, uptrain"),
        ((GQA8, "--checkpoint=x"), "--checkpoint goes with --stage=evaluate"),
        ((GQA8, "--stage=evaluate", "--checkpoint=no/where"), "no checkpoint in .*no/where"),
        ((GQA8, "--stage=report"), "results.jsonl: No such file or directory; run a stage"),
        ((GQA8, "--config.experiment=race"), "experiment='race'; use one of pipeline, speed"),
        (("--config=configs/sweeps/speed.py:medium",), "size='medium'; use one of pico, nano"),
        ((SPEED, "--config.benchmark.kv_heads=3"), "kv_heads=3 .* use one of 1, 2, 4, 8, 16"),
        ((SPEED, "--config.benchmark.inputs_lengths=()"), "inputs_lengths=; use lengths such as"),
        ((SPEED, "--config.benchmark.inputs_lengths=64,0"), "inputs_lengths=0; use lengths"),
        ((SPEED, "--config.benchmark.targets_length=1"), "targets_length=1; use 2 or more"),
        ((SPEED, "--config.benchmark.batch_size=0"), "batch_size=0; use a whole number, 1 or more"),
        ((SPEED, "--config.benchmark.memory_gib=0.1"), "memory_gib=0.1 holds no .* use 0.4"),
        (
            (SPEED, "--config.training.networks.mini.d_ff=0"),
            "mini.d_ff=0; use a whole number, 1 or more",
        ),
        ((SPEED, "--stage=finetune"), "--stage=finetune; use one of inference, training, report"),
        ((SPEED, "--stage=report"), "results.jsonl: No such file or directory"),
    ],
)
def test_a_mistake_is_one_line_and_costs_nothing(run, tmp_path, arguments, message):
    status, error = run(*arguments)
    assert status == 2
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    assert re.search(message, error), error
    assert not (tmp_path / "runs").exists()


def test_a_bad_row_is_named_by_file_and_line(run, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"source": 1, "target": "b"}\n')
    files = ("--config.finetune.tasks=files", f"--config.files.train={bad}")
    status, error = run(GQA8, *files)
    assert status == 2
    assert f"{bad}:1:" in error
    assert error.count("\n") == 1


def test_the_splits_that_will_be_needed_are_asked_for(run, tmp_path):
    good = tmp_path / "good.jsonl"
    good.write_text('{"source": "a", "target": "b"}\n')
    files = ["--config.finetune.tasks=files", f"--config.files.train={good}"]
    assert "needs validation=PATH" in run(GQA8, *files)[1]
    held = tmp_path / "held.jsonl"
    held.write_text('{"source": "c", "target": "d"}\n')
    files.append(f"--config.files.validation={held}")
    assert "files.test names no file, evaluate.split='test'" in run(GQA8, *files)[1]

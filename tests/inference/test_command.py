"""`python -m gqa generate`: the texts are those of `generate`, wherever they were read from."""

import dataclasses
import io
import json
import os

import numpy as np
import pytest

from gqa.__main__ import run_command
from gqa.checkpoints.checkpoint import Checkpoints
from gqa.data import text_lines, tokenizer
from gqa.data.tokenizer import EOS
from gqa.inference.generator import generate
from gqa.interop import huggingface
from gqa.runtime.errors import UserError

WORDS = ["the cat sat on the mat", "a dog ran", "cats and dogs sat and ran on mats"]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.model"
    return tokenizer.train(WORDS * 20, tokenizer.SMALLEST, path), path


@pytest.fixture
def network(tiny, random_params, vocabulary):
    """A network with random parameters, for the vocabulary, and its texts for some inputs."""
    tokens, _ = vocabulary
    config = dataclasses.replace(tiny, vocab_size=tokens.vocab_size, num_kv_heads_cross_attention=1)
    params = random_params(config)

    def texts(inputs):
        ids = [[*tokens.encode(text), EOS] for text in inputs]
        batch = np.zeros((len(ids), max(map(len, ids))), np.int32)
        for row, text in zip(batch, ids, strict=True):
            row[: len(text)] = text
        return [tokens.decode(row) for row in generate(params, config, batch, max_length=12)]

    return params, config, texts


@pytest.fixture
def checkpoint(network, vocabulary, tmp_path):
    """A checkpoint in a workdir that keeps its vocabulary."""
    params, config, _ = network
    tokens, path = vocabulary
    (tmp_path / "run" / "text").mkdir(parents=True)
    (tmp_path / "run" / "text" / "v.model").write_bytes(path.read_bytes())
    folder = tmp_path / "run" / "stages" / "finetune"
    with Checkpoints(folder) as checkpoints:
        info = {"model": dataclasses.asdict(config), "vocabulary": tokens.hash}
        checkpoints.save(3, {"params": params, "config": info}, {"validation_loss": 1.0})
    return folder


@pytest.fixture
def hf_folder(network, vocabulary, tmp_path):
    params, config, _ = network
    huggingface.save(params, config, tmp_path / "hf", vocabulary=vocabulary[1])
    return tmp_path / "hf"


def command(*arguments):
    run_command(["generate", "--max-length=12", "--batch-size=2", *map(str, arguments)])


def test_checkpoints_stand_beside_each_other(checkpoint, hf_folder, network, capsys):
    command(checkpoint, hf_folder, *WORDS)
    printed = capsys.readouterr()
    expected = network[2](WORDS)
    assert len(set(expected)) > 1
    lines = [
        [word, f"  A  {text}", f"  B  {text}"] for word, text in zip(WORDS, expected, strict=True)
    ]
    assert printed.out.splitlines() == [line.rstrip() for group in lines for line in group]
    assert f"A: {checkpoint} (4 query heads, " in printed.err
    assert printed.err.count("tokens/s") == 2


def test_lines_of_standard_input_are_texts(checkpoint, network, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(WORDS) + "\n\n"))
    command(checkpoint)
    assert capsys.readouterr().out.splitlines()[1::2] == [
        f"  A  {text}" for text in network[2](WORDS)
    ]


def test_a_jsonl_file_keeps_its_keys(checkpoint, network, capsys, tmp_path):
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps({"id": i, "q": w}) + "\n" for i, w in enumerate(WORDS)))
    command(f"--jsonl={file}", "--column=q", checkpoint, checkpoint)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    texts = network[2](WORDS)
    assert rows == [
        {"id": i, "q": word, "predictions": [texts[i]] * 2} for i, word in enumerate(WORDS)
    ]


def test_sampling_depends_on_the_seed_and_the_number_of_a_text_alone(checkpoint, capsys):
    def sample(seed, size):
        flags = ["--search=sample", "--temperature=2", f"--seed={seed}", f"--batch-size={size}"]
        run_command(["generate", "--max-length=12", *flags, str(checkpoint), *WORDS])
        return capsys.readouterr().out

    assert sample(1, 1) == sample(1, 3) != sample(2, 3)


def test_beam_search_is_that_of_the_library(checkpoint, capsys):
    def beams(count):
        command("--search=beam", f"--num-beams={count}", checkpoint, *WORDS)
        return capsys.readouterr().out

    command(checkpoint, *WORDS)
    greedy = capsys.readouterr().out
    assert beams(1) == greedy != beams(4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "a text"], "nowhere: no such folder; name a checkpoint first"),
        (["CHECKPOINT", "runs/x/mistyped"], "runs/x/mistyped: no such folder; if it is a text"),
        (["--top-p=0", "CHECKPOINT", "a"], "--top-p=0.0: use a value above 0, at most 1"),
        (["--num-beams=0", "CHECKPOINT", "a"], "--num-beams=0: use a whole number, 1 or more"),
        (["--temperature=-1", "CHECKPOINT", "a"], "--temperature=-1.0: use 0 or more"),
        (["--jsonl=x", "CHECKPOINT", "a"], "--jsonl and texts on the command line exclude"),
        (["--jsonl=none.jsonl", "CHECKPOINT"], "none.jsonl: No such file"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, checkpoint):
    arguments = [str(checkpoint) if word == "CHECKPOINT" else word for word in arguments]
    with pytest.raises(UserError, match="^" + message.replace(".", r"\.")) as caught:
        run_command(["generate", *arguments])
    assert "\n" not in str(caught.value)


def test_wrong_rows_and_vocabularies_are_named(checkpoint, hf_folder, tmp_path):
    file = tmp_path / "in.jsonl"
    for line, message in (("{", "not JSON"), ("[1]", "no keys"), ('{"a": 1}', "chooses among a")):
        file.write_text('{"source": "x"}\n' + line + "\n")
        with pytest.raises(UserError, match=f"in.jsonl, line 2: .*{message}"):
            command(f"--jsonl={file}", checkpoint)

    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UserError, match=r"in\.jsonl: is a device, a pipe or a socket"):
        command(f"--jsonl={file}", checkpoint)
    file.unlink()
    with open(file, "wb") as long:
        long.truncate(text_lines.LONGEST + 2)
    with pytest.raises(UserError, match=r"in\.jsonl, line 1: longer than"):
        command(f"--jsonl={file}", checkpoint)

    other = tmp_path / "other.model"
    tokenizer.train(["other words"] * 50, tokenizer.SMALLEST, other)
    with pytest.raises(UserError, match=r"other\.model is not the vocabulary that"):
        command(f"--vocabulary={other}", checkpoint, "a")

    (tmp_path / "run" / "text" / "v.model").unlink()
    with pytest.raises(UserError, match="its vocabulary is in no folder text/ above it"):
        command(checkpoint, "a")

"""A folder of CTranslate2 chooses our tokens, for every kind of KV heads."""

import importlib.util
import sys

import jax
import numpy as np
import pytest

import gqa
from gqa.__main__ import run_command
from gqa.conversion import convert
from gqa.data import tokenizer
from gqa.inference.decoding import GREEDY, Beam
from gqa.interop import ctranslate2_folders, huggingface
from gqa.interop.huggingface import from_state_dict
from gqa.model.transformer import Transformer, init_params
from gqa.runtime.errors import CheckpointError, UserError
from tests.interop.test_huggingface import read_golden

HAVE_CTRANSLATE2 = importlib.util.find_spec("ctranslate2") is not None
needs_ctranslate2 = pytest.mark.skipif(not HAVE_CTRANSLATE2, reason="needs ctranslate2")

# KV heads of the golden networks, which have 4 heads, 2 encoder layers and 3 decoder layers.
HEADS = {
    "multi-head": 4,
    "mqa": {"self_attention": 1, "cross_attention": 1},
    "by layer": {"self_attention": (4, 1, 2), "cross_attention": (1, 2, 4), "encoder": 2},
}
LENGTH = 8


def translator(params, config, folder):
    """A translator whose tokens are named "0", "1" and so on."""
    import ctranslate2

    model = ctranslate2_folders.specification(params, config)
    ctranslate2_folders.register(model, [str(i) for i in range(config.vocab_size)])
    model.save(str(folder))
    return ctranslate2.Translator(str(folder), device="cpu", intra_threads=1)


@needs_ctranslate2
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("version", ["t5_1_0", "t5_1_1"])
def test_its_tokens_are_ours(version, heads, tmp_path):
    state, hf_config, (inputs, targets, _) = read_golden(version)
    params, config, _ = convert(*from_state_dict(state, hf_config), HEADS[heads])
    inputs = inputs[:, :20]  # without padding
    assert (inputs > 0).all()
    theirs = translator(params, config, tmp_path)
    source = [[str(token) for token in row] for row in inputs]
    for search in (GREEDY, Beam(num_beams=4, length_penalty=0.0)):
        ours = gqa.generate(params, config, inputs, max_length=LENGTH, search=search, stop=False)
        results = theirs.translate_batch(
            source,
            beam_size=getattr(search, "num_beams", 1),
            length_penalty=0,
            min_decoding_length=LENGTH,
            max_decoding_length=LENGTH,
        )
        tokens = [[int(token) for token in result.hypotheses[0]] for result in results]
        # Up to the minimum length CTranslate2 never chooses the end token, which ours may.
        rows = (ours != 1).all(axis=1)
        assert rows.any()
        np.testing.assert_array_equal(np.array(tokens)[rows], ours[rows])

    # The log-probabilities of given texts, whose end token is scored, too.
    texts = targets[: len(inputs), :LENGTH]
    targets = np.concatenate([texts, np.ones_like(texts[:, :1])], axis=1)
    logits = Transformer(config).apply({"params": params}, {"inputs": inputs, "targets": targets})
    expected = np.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], 2)[..., 0]
    scored = theirs.score_batch(source, [[str(token) for token in text] for text in texts])
    np.testing.assert_allclose([x.log_probs for x in scored], expected, atol=1e-4)


@needs_ctranslate2
def test_a_folder_has_the_vocabulary_and_texts_go_through_it(tiny, tmp_path):
    import ctranslate2
    from tokenizers import Tokenizer

    known = tokenizer.train(["some words to learn from"] * 20, 455, tmp_path / "a.model")
    config = gqa.Config(**{**vars(tiny), "vocab_size": known.vocab_size})
    params = init_params(config, 0)
    folder = tmp_path / "folder"
    ctranslate2_folders.save(params, config, folder, tmp_path / "a.model")
    names = {path.name for path in folder.iterdir()}
    assert {"model.bin", "config.json", "shared_vocabulary.json", "tokenizer.json"} <= names

    theirs = ctranslate2.Translator(str(folder), device="cpu", intra_threads=1)
    tokens = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("some größe").tokens
    (result,) = theirs.score_batch([tokens], [tokens[:-1]])
    assert len(result.log_probs) == len(tokens)

    with pytest.raises(CheckpointError, match="folder: is there already; name a new folder"):
        ctranslate2_folders.save(params, config, folder, tmp_path / "a.model")


@needs_ctranslate2
def test_what_it_cannot_express_is_refused(tiny, random_params, tmp_path, monkeypatch):
    params = random_params(tiny)
    with pytest.raises(CheckpointError, match="is a folder; name a SentencePiece file"):
        ctranslate2_folders.save(params, tiny, tmp_path / "a", tmp_path)
    usual = huggingface.from_config(tiny)
    for key, value in (("eos_token_id", 2), ("feed_forward_proj", "gated-tanh")):
        monkeypatch.setattr(huggingface, "from_config", lambda _, k=key, v=value: usual | {k: v})
        with pytest.raises(CheckpointError, match=f"{key}=2 is not|not with {value}"):
            ctranslate2_folders.specification(params, tiny)


def test_without_the_package_it_says_how_to_get_it(tiny, random_params, monkeypatch):
    monkeypatch.setitem(sys.modules, "ctranslate2.specs", None)
    with pytest.raises(UserError, match="ctranslate2 is not installed; pip install ctranslate2"):
        ctranslate2_folders.specification(random_params(tiny), tiny)


def test_arguments_that_do_not_go_together_are_refused_before_anything_is_read():
    for arguments, message in (
        (["--format=onnx"], "--format='onnx'.* huggingface, ctranslate2"),
        (["--format=ctranslate2"], "--format=ctranslate2 works on tokens; name their --vocabulary"),
        (["--format=ctranslate2", "--expand"], "--expand=True is not for --format=ctranslate2"),
    ):
        with pytest.raises(UserError, match=message):
            run_command(["export", "nowhere", "folder", *arguments])

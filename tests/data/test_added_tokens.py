"""Vocabularies of Hugging Face folders: the ids are those that Transformers reads there."""

import json
import shutil

import numpy as np
import pytest
import sentencepiece

from gqa.data import tokenizer
from gqa.runtime.errors import UserError

TEXTS = ["the cat sat on the mat", "the <extra_id_0> cat <extra_id_1> sat", "a cat", "x <new> cat"]
WORDS = ["the cat sat on a mat and the dog sat on the cat, x y z new"] * 30


@pytest.fixture(scope="module")
def spiece(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "spiece.model"
    tokenizer.train(WORDS, 460, path)
    return path


def folder_of(tmp_path, spiece=None, **files):
    if spiece is not None:
        shutil.copy(spiece, tmp_path / "spiece.model")
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def entry(token, number, special=True):
    return {"id": number, "content": token, "special": special}


def test_a_folder_that_says_what_t5_says_is_the_model_alone(tmp_path, spiece):
    alone = tokenizer.load(spiece)
    decoder = {
        str(token): {"content": f"<extra_id_{k}>", "special": True}
        for k, token in enumerate(alone.sentinels.tolist())
    }
    says = {"tokenizer_class": "T5Tokenizer", "extra_ids": 100, "added_tokens_decoder": decoder}
    assert tokenizer.load(folder_of(tmp_path, spiece)).hash == alone.hash
    assert tokenizer.load(folder_of(tmp_path, tokenizer_config=says)).hash == alone.hash


@pytest.mark.parametrize("where", ["count", "decoder", "added", "fast"])
def test_sentinels_have_the_ids_that_the_files_say(tmp_path, spiece, where):
    alone = tokenizer.load(spiece)
    ids = {f"<extra_id_{k}>": alone.num_pieces + 199 - k for k in range(200)}
    decoder = {str(i): {"content": token, "special": True} for token, i in ids.items()}
    files = {
        "count": {"tokenizer_config": {"extra_ids": 200}},
        "decoder": {"tokenizer_config": {"added_tokens_decoder": decoder}},
        "added": {"added_tokens": ids},
        "fast": {"tokenizer": {"added_tokens": [entry(t, i) for t, i in ids.items()]}},
    }
    found = tokenizer.load(folder_of(tmp_path, spiece, **files[where]))
    assert found.encode("<extra_id_0><extra_id_199>") == [*ids.values()][::199]
    np.testing.assert_array_equal(found.sentinels, [*ids.values()])
    assert found.num_ids == alone.num_pieces + 200
    assert found.hash != alone.hash


def test_padding_and_end_are_the_tokens_that_the_files_name(tmp_path):
    """MADLAD-400 has <unk> 0, <s> 1 and </s> 2, and pads with <s>."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=24,
        minloglevel=2,
    )
    found = tokenizer.load(folder_of(tmp_path, special_tokens_map={"pad_token": "<s>"}))
    assert found.special[:2] == (1, 2)
    ids = found.encode("the cat")
    assert found.decode([*ids, 1, 2, *ids]) == "the cat"
    assert found.encode("a</s>") == [*found.encode("a"), 2]


def test_a_plain_added_token_is_a_word(tmp_path, spiece):
    number = tokenizer.load(spiece).num_ids
    found = tokenizer.load(folder_of(tmp_path, spiece, added_tokens={"<new>": number}))
    ids = found.encode("the <new> cat <extra_id_0>")
    assert number in ids
    assert found.decode(ids, skip_special_tokens=True) == "the <new> cat"
    assert found.normalize("the <new> cat <extra_id_0>") == "the <new> cat"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no spiece.model and no tokenizer.json"),
        ({"tokenizer": {"model": 3}}, "not a tokenizer"),
        ({"tokenizer": []}, r"tokenizer\.json: not a JSON object"),
        ({"tokenizer_config": {"extra_ids": -1}}, "extra_ids=-1 is no"),
        ({"added_tokens": {"<a>": "x"}}, r"added_tokens\.json: '<a>' with id 'x' is no token"),
        (
            {"added_tokens": {"<a>": 7}, "tokenizer": {"added_tokens": [entry("<a>", 8)]}},
            "<a> has id 7, another file says 8",
        ),
    ],
)
def test_folders_that_cannot_be_read_are_refused(tmp_path, files, message):
    with pytest.raises(UserError, match=rf"^vocabulary .*{message}"):
        tokenizer.load(folder_of(tmp_path, **files))


def test_vocabularies_are_those_of_transformers(tmp_path, spiece):
    transformers = pytest.importorskip("transformers")
    folder = folder_of(tmp_path, spiece, tokenizer_config={"extra_ids": 200})
    theirs = transformers.T5Tokenizer.from_pretrained(folder)
    theirs.add_tokens(["<new>"])
    theirs.save_pretrained(tmp_path / "fast")
    theirs_bytes = transformers.ByT5Tokenizer()
    theirs_bytes.save_pretrained(tmp_path / "bytes")

    # As a tokenizer.json alone, and with the SentencePiece file that it was made of.
    for name, tokens in (("fast", theirs), ("fast", theirs), ("bytes", theirs_bytes)):
        found = tokenizer.load(tmp_path / name)
        assert found.special == (tokens.pad_token_id, tokens.eos_token_id, tokens.pad_token_id)
        for text, ids in zip(TEXTS, found.encode_batch(TEXTS), strict=True):
            assert [*ids, found.special.eos] == tokens(text).input_ids
            assert found.encode(text) == ids
        ids = found.encode(TEXTS[0])
        assert found.decode([*ids, found.special.eos, 5]) == TEXTS[0] == found.normalize(TEXTS[0])
        shutil.copy(spiece, tmp_path / "fast")


def test_bytes_have_the_last_bytes_as_sentinels(tmp_path):
    found = tokenizer.load(
        folder_of(tmp_path, tokenizer_config={"tokenizer_class": "ByT5Tokenizer"})
    )
    assert found.encode("aé") == [100, 198, 172]
    assert found.decode(found.encode(" größer\n▁ \U0001f600 ")) == " größer\n▁ \U0001f600 "
    assert found.sentinels[:2].tolist() == [258, 257]
    assert found.encode("<extra_id_0>") == [259]
    assert (found.num_ids, found.vocab_size) == (384, 384)

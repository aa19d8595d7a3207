"""The tokenizer.json of a vocabulary gives our ids and our texts, for texts of every kind."""

import importlib.util
import io
import random
import re

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as model_pb2
from tokenizers import Tokenizer

from gqa.data import lexicon, tokenizer
from gqa.interop.huggingface import tokenizer_files
from gqa.interop.huggingface.normalization import read_rules
from gqa.runtime.errors import UserError

PROSE = [
    "The quick brown fox jumps over the lazy dog; größe, naïve, café, 日本語, 한국어.",
    "See <https://example.org/page?x=0x41> for 1,234.5 and a/b -- or not ... aaa aaaa!",
    "Grouped-query attention reads fewer keys and values than multi-head attention.",
] * 20
WORDS = ["English: w o r d", "German: g r ö ß e", "French: é t é", "ʃ ɛː tʃ ɔɪ ŋ ɡ"] * 20


def without_bytes(path):
    """A vocabulary as T5's: rare characters are unknown, "<" among them."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text.replace("<", "").replace(">", "") for text in PROSE]),
        model_writer=model, vocab_size=150, hard_vocab_limit=False, minloglevel=2,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
    )  # fmt: skip
    path.write_bytes(model.getvalue())


VOCABULARIES = {
    "unigram": lambda path: tokenizer.train(PROSE, 640, path),
    "bpe": lambda path: tokenizer.train(PROSE, 640, path, "bpe"),
    "words": lambda path: tokenizer.train(WORDS, 500, path, *_design(lexicon.VOCABULARY)),
    "without bytes": without_bytes,
}


def _design(design):
    return design.model_type, design.symbols, design.coverage


class Both:
    """A vocabulary of ours and its tokenizer.json, which is too long to be printed."""

    def __init__(self, known, theirs, model):
        self.known, self.theirs, self.model = known, theirs, model


@pytest.fixture(scope="module", params=VOCABULARIES)
def both(request, tmp_path_factory):
    """A vocabulary of ours, and its tokenizer.json as another program reads it."""
    folder = tmp_path_factory.mktemp("vocabulary")
    VOCABULARIES[request.param](folder / "a.model")
    tokenizer_files.write(folder / "a.model", folder)
    known = tokenizer.load(folder / "a.model")
    model = model_pb2.ModelProto.FromString((folder / "a.model").read_bytes())
    return Both(known, Tokenizer.from_file(str(folder / "tokenizer.json")), model)


ODD = [
    *("größe", "gro\u0308\u00dfe", "e\u0323\u0302", "q\u0302\u0323", "\u01d5", "U\u0308\u0304"),
    *("ｆｕｌｌ", "？", "～", "①", "ﬁ", "㎏", "ﷺ", "\ufb2c", "ｶﾞ", "\u1112\u1161\u11ab"),
    *("한", "어\u11ab", "👍🏽", "👨\u200d👩\u200d👧", "❤\ufe0f", "🇩🇪", "नमस्ते", "أ\u064b\u0651"),
    *("\U00011382\U000113c9", "\U0001e068\u0308", "▁", "<extra_id_0>", "<extra_id_99>"),
    *("<extra_id_100>", "<extra_id_07>", "</s>", "<pad>", "<unk>", "<0x41>", "<0x", "＜/s＞"),
    *("＜pad＞", "＜0x0A＞", "＜extra_id_3＞", "<s>", "<", ">", "<>", "English:", "▁English:"),
    *("English", ":", "tʃ", "ʃ", "ŋ", "the", "aaaaaaa", "http://", "0x41"),
]
ODD += [*" \n\t\0\x01\u00a0\u3000\u2028\u200b\u00ad", "  ", "\r\n"]
# Not the noncharacters that mark places in the normalizer.
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\ufdd0\ufdd1\ufdd2")
TEXTS = st.lists(st.sampled_from(ODD) | st.sampled_from(PROSE[0].split()) | CHARACTERS).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_ids_and_texts_are_ours(both, text):
    known, theirs = both.known, both.theirs
    ids = known.encode(text)
    assert theirs.encode(text).ids == [*ids, tokenizer.EOS]

    # Ours ends at the first end token, theirs leaves it out. An unknown token is special to them.
    if tokenizer.EOS not in ids and known.unknown not in ids:
        for skip in (True, False):
            expected = known.decode(ids, skip_special_tokens=skip)
            if tokenizer.PAD not in ids:
                assert theirs.decode(ids, skip_special_tokens=skip).strip() == expected.strip()


def test_every_rule_of_normalization_is_kept(both):
    """All rules in turn, alone and behind each other, in an order that is random."""
    known, theirs = both.known, both.theirs
    rules = list(read_rules(both.model.normalizer_spec.precompiled_charsmap))
    assert len(rules) > 200_000
    random.Random(0).shuffle(rules)
    texts = ["".join(rules[i : i + 3]) for i in range(0, 6000, 3)]
    texts += [sequence for sequence in rules if len(sequence) == 1]
    assert [
        text
        for text, encoding in zip(texts, theirs.encode_batch(texts), strict=True)
        if encoding.ids[:-1] != known.encode(text)
    ] == []


@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="needs transformers")
def test_transformers_takes_it_before_spiece_model(tmp_path):
    import transformers

    VOCABULARIES["words"](tmp_path / "spiece.model")
    tokenizer_files.write(tmp_path / "spiece.model", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    known = tokenizer.load(tmp_path / "spiece.model")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("English: größe <extra_id_3> ｂ", "", "日本"):
        assert theirs(text)["input_ids"] == [*known.encode(text), tokenizer.EOS]
        assert theirs(text).keys() == {"input_ids", "attention_mask"}
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.unk_token_id) == (0, 1, 2)
    ids = known.encode("English: größe <extra_id_3> b")
    assert theirs.decode([0, *ids, 1], skip_special_tokens=True) == "English: größe b"


def test_a_vocabulary_that_cannot_be_written_is_refused_in_one_line(tmp_path):
    path = tmp_path / "a.model"
    tokenizer.train(PROSE, 640, path)
    original = path.read_bytes()

    def unused(model):
        model.pieces[300].type = tokenizer_files.Piece.UNUSED

    def spells_the_end(model):
        model.pieces[300].piece = "x</s>"

    def spaces_behind(model):
        model.trainer_spec.treat_whitespace_as_suffix = True

    def word(model):
        model.trainer_spec.model_type = 3

    def symbol(model):
        model.pieces[300].type = tokenizer_files.Piece.USER_DEFINED

    for change, reason in (
        (unused, "it has unused pieces"),
        (spells_the_end, "its pieces can spell </s>, which is a special piece"),
        (spaces_behind, "it writes spaces behind words"),
        (word, "it is neither a unigram nor a BPE model"),
        (symbol, "it has symbols defined by its user other than words"),
    ):
        model = model_pb2.ModelProto.FromString(original)
        change(model)
        path.write_bytes(model.SerializeToString())
        with pytest.raises(UserError, match=f"a.model: cannot be .* because {re.escape(reason)}"):
            tokenizer_files.write(path, tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()

"""SentencePiece files from strangers: those that would take memory or time are refused by name."""

import io
import struct

import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from gqa.data import tokenizer, vocabulary_files
from gqa.runtime.errors import UserError

NO_NODE = 0x80000000  # a unit that holds a value: here the place of the first replacement


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "spiece.model"
    tokenizer.train(["the cat sat on the mat"] * 20, 460, path)
    return path.read_bytes()


def rules(units, replacements):
    array = np.asarray(units, "<u4").tobytes()
    return struct.pack("<I", len(array)) + array + replacements


def chain(length):
    """Units of a trie that matches `length` times the letter a and writes the first replacement."""
    units = np.full(256 * (length + 2), NO_NODE, np.uint32)
    place, label = 0, 0
    for step in range(1, length + 2):
        base, is_last = 256 * step, step == length + 1
        units[place] = (place ^ base) << 10 | is_last << 8 | label
        place, label = base ^ ord("a"), ord("a")
    units[0] = 1 << 10 | 1 << 9  # an offset of 256 in its other form, in steps of 256
    return units


def loop():
    """Units of a trie that matches every text to its end: all nodes lead back to one base."""
    places = np.arange(512, 768, dtype=np.uint32)
    units = np.full(1024, NO_NODE, np.uint32)
    units[places] = (places ^ 512) << 10 | (places ^ 512)
    units[0] = 512 << 10
    return units


def astray():
    """Units of a trie whose root leads behind the last unit."""
    units = np.full(256, NO_NODE, np.uint32)
    units[0] = 1 << 15 << 10
    return units


def set_rules(value, field="normalizer_spec"):
    return lambda model: setattr(getattr(model, field), "precompiled_charsmap", value)


def swap_pieces(i, j):
    def swap(model):
        first, second = model.pieces[i].piece, model.pieces[j].piece
        model.pieces[i].piece, model.pieces[j].piece = second, first
        model.pieces[i].type, model.pieces[j].type = model.pieces[j].type, model.pieces[i].type

    return swap


LONG = b"x" * (vocabulary_files.LONGEST_RULE + 1) + b"\0"
WRONG = {
    "no pieces": (lambda model: model.ClearField("pieces"), "one without pieces"),
    "a score": (lambda model: setattr(model.pieces[9], "score", float("nan")), "NaN or infinite"),
    "a loop": (set_rules(rules(loop(), b"x\0")), "matches over 128 bytes"),
    "a long match": (set_rules(rules(chain(129), b"x\0")), "matches over 128 bytes"),
    "a long replacement": (set_rules(rules(chain(1), LONG)), "writes over 128 bytes"),
    "decoding": (
        set_rules(rules(chain(1), LONG), "denormalizer_spec"),
        "writes over 128 bytes",
    ),
    "no size": (set_rules(b"xy"), "rules of normalization are damaged"),
    "a wrong size": (set_rules(struct.pack("<I", 1 << 20) + b"xy"), "are damaged"),
    "astray": (set_rules(rules(astray(), b"x\0")), "are damaged"),
    "eos": (swap_pieces(1, 300), r"pad and eos have ids \[0, 300\], T5 needs \[0, 1\]"),
    "one sentinel": (lambda model: model.pieces.add(piece="<extra_id_0>"), "must be <extra_id_1>"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_crafted_file_is_refused_by_name(tmp_path, content, name):
    change, message = WRONG[name]
    model = sentencepiece_model_pb2.ModelProto.FromString(content)
    change(model)
    (tmp_path / "a.model").write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=rf"vocabulary .*a\.model: .*{message}"):
        tokenizer.load(tmp_path / "a.model")


def test_unknown_may_have_another_id(tmp_path, content):
    """Some copies of T5's vocabulary have <s> as piece 2 and <unk> as piece 3."""
    model = sentencepiece_model_pb2.ModelProto.FromString(content)
    swap_pieces(2, 300)(model)
    (tmp_path / "a.model").write_bytes(model.SerializeToString())
    vocabulary = tokenizer.load(tmp_path / "a.model")
    assert vocabulary.encode("<unk>") == [300]
    assert vocabulary.normalize("a <unk>") == tokenizer.from_model(content).normalize("a <unk>")


def test_a_rule_of_the_longest_length_is_taken(tmp_path, content):
    model = sentencepiece_model_pb2.ModelProto.FromString(content)
    longest = vocabulary_files.LONGEST_RULE
    set_rules(rules(chain(longest), b"the\0"))(model)
    (tmp_path / "a.model").write_bytes(model.SerializeToString())
    assert tokenizer.load(tmp_path / "a.model").normalize("a" * longest) == "the"


def test_the_number_of_pieces_is_bounded(tmp_path, content, monkeypatch):
    (tmp_path / "a.model").write_bytes(content)
    number = tokenizer.load(tmp_path / "a.model").num_pieces
    monkeypatch.setattr(vocabulary_files, "MOST_PIECES", number)
    tokenizer.load(tmp_path / "a.model")
    monkeypatch.setattr(vocabulary_files, "MOST_PIECES", number - 1)
    with pytest.raises(UserError, match=rf"a\.model: {number} pieces; at most {number - 1}"):
        tokenizer.load(tmp_path / "a.model")


@pytest.mark.parametrize("rule", ["nmt_nfkc", "nmt_nfkc_cf", "identity"])
def test_the_librarys_own_rules_are_taken(rule):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat"] * 20),
        model_writer=model,
        vocab_size=30,
        hard_vocab_limit=False,
        normalization_rule_name=rule,
        minloglevel=2,
    )
    vocabulary_files.check(model.getvalue())

"""Text survives the tokenizer, and ids stand where T5 has them."""

import pathlib

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from gqa.data import batching, tokenizer
from gqa.data.tokenizer import EOS, NUM_SENTINELS, PAD, UNK
from gqa.runtime.errors import UserError


@pytest.fixture(scope="module")
def source():
    return pathlib.Path(batching.__file__).read_text()


@pytest.fixture(scope="module")
def model(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "spiece.model"
    tokenizer.train([source], 520, path)
    return path


def test_text_and_code_survive_encoding(model):
    text = "def f(x: int) -> dict: return {'a': [x ** 2], \"b\": ~x % 3} # größer 日本 \U0001f600"
    ids = tokenizer.load(model).encode(text)
    assert UNK not in ids
    assert tokenizer.load(model).decode(ids) == text


def test_newlines_read_as_spaces(model):
    loaded = tokenizer.load(model)
    assert loaded.encode("one\n\n    two") == loaded.encode("one two")


def test_ids_are_laid_out_as_in_t5(model):
    loaded = tokenizer.load(model)
    assert loaded.num_pieces == 520 - NUM_SENTINELS
    assert [loaded.sentinels[k] for k in (0, 1, 99)] == [519, 518, 420]
    assert loaded.vocab_size == 640  # 520 rounded up to a multiple of 128


def with_sentinels(model):
    """A vocabulary whose last pieces are the sentinels, as some copies of T5's have them."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.read_bytes())
    for k in reversed(range(NUM_SENTINELS)):
        proto.pieces.add(piece=f"▁<extra_id_{k}>", score=0.0)
    return tokenizer.from_model(proto.SerializeToString())


def test_sentinels_inside_the_model_are_not_added_twice(model):
    inside = with_sentinels(model)
    behind = tokenizer.load(model)
    assert inside.sentinels[0] == behind.sentinels[0]
    assert inside.vocab_size == behind.vocab_size
    assert inside.decode([inside.sentinels[7]]) == "<extra_id_7>"


def test_decode_stops_at_eos_and_names_sentinels(model):
    loaded = tokenizer.load(model)
    a, b = loaded.encode("batch"), loaded.encode("length")
    ids = [*a, loaded.sentinels[0], *b, loaded.sentinels[12], PAD, EOS, *b]
    assert loaded.decode(ids) == "batch <extra_id_0> length <extra_id_12>"
    assert loaded.decode([*a, loaded.vocab_size - 1]) == "batch"  # a padding row of the embedding


def test_batches_encode_as_single_texts_do(model, source):
    loaded = tokenizer.load(model)
    lines = source.splitlines()
    assert loaded.encode_batch(lines) == [loaded.encode(line) for line in lines]


def test_training_is_deterministic_and_reads_long_lines(model, source, tmp_path):
    tokenizer.train([source], 520, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == model.read_bytes()
    # One line beyond SentencePiece's limit is all there is to learn from.
    one_line = tokenizer.train([" ".join(source.split())], 520, tmp_path / "one_line")
    assert len(one_line.encode("span corruption")) < len("span corruption")


def test_mistakes_are_named(model, source, tmp_path):
    with pytest.raises(UserError, match=r"vocab_size=120 is too small; use at least 454"):
        tokenizer.train([source], 120, tmp_path / "small")
    with pytest.raises(UserError, match="missing: No such file"):
        tokenizer.load(tmp_path / "missing")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        tokenizer.load(tmp_path / "text")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(source.splitlines()),
        model_prefix=str(tmp_path / "llama"),
        vocab_size=300,
        minloglevel=2,
    )
    with pytest.raises(UserError, match="T5 needs"):
        tokenizer.load(tmp_path / "llama.model")


@pytest.mark.parametrize("model_type", tokenizer.MODEL_TYPES)
def test_a_vocabulary_that_the_text_cannot_fill_is_smaller(model_type, tmp_path):
    ours = tokenizer.train(["the cat sat on the mat"] * 50, 4096, tmp_path / "m", model_type)
    assert tokenizer.SMALLEST <= ours.num_pieces + NUM_SENTINELS < 600
    assert tokenizer.load(tmp_path / "m").hash == ours.hash
    assert ours.decode(ours.encode("the cat sat")) == "the cat sat"


def test_bpe_keeps_phonemes_whole(tmp_path):
    """Each is frequent and short; a unigram model divides some of them."""
    words = ["t ə m eɪ t oʊ", "k ə n t ɪ n j u", "n eɪ ʃ ə n", "k oʊ t", "ɪ n"]
    texts = [" ".join(words[i:] + words[:i]) for i in range(5)] * 20
    bpe = tokenizer.train(texts, 490, tmp_path / "m", "bpe")
    for word in words:
        assert len(bpe.encode(word)) <= len(word.split())


def test_all_of_a_long_line_is_learned_from(tmp_path):
    """A word that stands only behind the first thousand characters of a line becomes a piece."""
    line = " ".join(["red green blue"] * 100 + ["xylophone quartz"] * 100)
    vocabulary = tokenizer.train([line], 458, tmp_path / "spiece.model")
    assert line.index("xylophone") > 1000
    assert len(vocabulary.encode("xylophone")) <= 3


def test_other_models_have_other_hashes(model, tmp_path):
    other = tokenizer.train(["another text to learn from"], 455, tmp_path / "other")
    assert other.hash != tokenizer.load(model).hash
    assert tokenizer.load(tmp_path / "other").hash == other.hash


SPECIAL_TEXTS = [
    "sat <extra_id_0> mat",
    "sat<extra_id_0>mat",
    "<extra_id_0> the cat <extra_id_1> mat <extra_id_99>",
    "the </s> cat",
    "the<pad>cat",
    "the <unk> cat",
    "  the  <extra_id_5>  cat ",
    "<extra_id_0>",
    "<extra_id_100> and <extra_id_01> and <extra_id_> and < s >",
    "no special token",
]


@pytest.mark.parametrize("text", SPECIAL_TEXTS)
def test_special_tokens_in_a_text_are_those_of_transformers(text, model):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.T5Tokenizer.from_pretrained(model.parent)
    expected = theirs(text, add_special_tokens=False).input_ids
    ours = tokenizer.load(model)
    assert ours.encode(text) == expected
    others = ours.encode("the cat")
    assert ours.encode_batch([text, "the cat", text]) == [expected, others, expected]


def test_what_decode_writes_encode_reads(model):
    ours = tokenizer.load(model)
    ids = [ours.sentinels[0], *ours.encode("the cat"), ours.sentinels[1], ours.sentinels[99]]
    assert ours.encode(ours.decode(ids)) == ids
    assert ours.decode(ids, skip_special_tokens=True) == "the cat"


@pytest.mark.parametrize("text", ["你好吗？", " ﬁve  ｃats\n ", "größe", "a\u0303 ɔ̃", "½ …"])
def test_normalize_gives_what_decode_gives(text, model):
    """Bytes spell the characters that have no piece, so that only normalization changes a text."""
    ours = tokenizer.load(model)
    assert ours.normalize(text) == ours.decode(ours.encode(text))


@pytest.mark.parametrize("text", [*SPECIAL_TEXTS[:-2], "the</s>", "<pad></s> cat", "</s>"])
def test_a_perfect_answer_equals_its_reference_with_special_tokens(text, model):
    """Spaces do not count in any metric."""
    ours = tokenizer.load(model)
    answer = ours.decode(ours.encode(text), skip_special_tokens=True)
    assert ours.normalize(text).split() == answer.split()


@pytest.mark.parametrize(
    "text", ["sat ＜extra_id_0＞ mat", "＜extra_id_99＞", "the ＜/s＞ cat", "？"]
)
def test_a_perfect_answer_equals_its_reference_with_fullwidth_tokens(text, model):
    """Only a vocabulary that holds "<extra_id_0>" takes the fullwidth form for the sentinel."""
    behind, inside = tokenizer.load(model), with_sentinels(model)
    for ours in (behind, inside):
        ids = ours.encode(text)
        answer = ours.decode(ids, skip_special_tokens=True)
        assert ours.normalize(text).split() == answer.split()
        has_sentinel = ours is inside and "extra" in text
        assert any(token >= ours.num_pieces for token in ids) == has_sentinel


def test_a_fullwidth_question_mark_becomes_an_ordinary_one(model):
    assert tokenizer.load(model).normalize("你好吗？") == "你好吗?"

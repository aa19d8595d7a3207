"""T5's relatives, read from folders that Transformers wrote: the same logits, texts and folders."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gqa.checkpoints import pieces
from gqa.inference.decoding import GREEDY, Beam
from gqa.inference.generator import generate
from gqa.interop import huggingface
from gqa.interop.huggingface import activations, names
from gqa.interop.huggingface.config import to_config
from gqa.model.activations import FUNCTIONS, GATED, function, is_gated
from gqa.model.transformer import Transformer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 40,
    "d_model": 24,
    "d_kv": 8,
    "d_ff": 32,
    "num_heads": 4,
    "num_layers": 2,
    "decoder_start_token_id": 0,
}
OTHER_IDS = {"pad_token_id": 3, "eos_token_id": 2, "decoder_start_token_id": 5}

# What each relative's config.json says differently, by the model type and a published model.
FAMILY = {
    "t5 ul2": {"feed_forward_proj": "gated-silu", "tie_word_embeddings": False},
    "t5 exact gelu": {"feed_forward_proj": "gelu"},
    "t5 madlad400": OTHER_IDS | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "t5 codet5p": {"eos_token_id": 2},
    "mt5 base": {},
    "umt5 base": {},
    "umt5 pile-t5": OTHER_IDS | {"feed_forward_proj": "gated-silu"},
}
LENGTH = 10


@pytest.fixture(params=FAMILY)
def model(request):
    """A random model of Transformers whose norms, biases and logits all matter."""
    kind, _ = request.param.split(" ", 1)
    classes = {"t5": "T5", "mt5": "MT5", "umt5": "UMT5"}
    config = getattr(transformers, f"{classes[kind]}Config")(**SIZES | FAMILY[request.param])
    torch.manual_seed(0)
    model = getattr(transformers, f"{classes[kind]}ForConditionalGeneration")(config)
    if not getattr(config, "scale_decoder_outputs", True):
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "relative_attention_bias" in name:
                weight.normal_()
            elif "layer_norm" in name:
                weight.uniform_(0.5, 1.5)
    return model.eval()


def batch_of(config):
    """Inputs and targets in which every id occurs, the inputs padded to different lengths."""
    rng = np.random.default_rng(0)
    inputs = rng.permuted(np.tile(np.arange(40), (8, 1)), axis=1)[:, :20]
    inputs[inputs == config.pad_token_id] = 39
    inputs[np.arange(20) >= np.arange(6, 22, 2)[:, None]] = config.pad_token_id
    return inputs.astype(np.int32), rng.integers(6, 40, (8, 9), dtype=np.int32)


def their_logits(model, inputs, targets):
    inputs, labels = torch.tensor(inputs).long(), torch.tensor(targets).long()
    mask = (inputs != model.config.pad_token_id).long()
    with torch.no_grad():
        return model(input_ids=inputs, attention_mask=mask, labels=labels).logits.numpy()


def their_texts(model, inputs, num_beams):
    """Texts [B, LENGTH], padded behind their end; with penalty 0 both beam searches agree."""
    inputs, config = torch.tensor(inputs).long(), model.generation_config
    mask = (inputs != config.pad_token_id).long()
    options = {"length_penalty": 0.0} if num_beams > 1 else {}
    out = model.generate(
        inputs, attention_mask=mask, max_new_tokens=LENGTH, num_beams=num_beams, **options
    )[:, 1:].numpy()
    texts = np.full((len(out), LENGTH), config.pad_token_id)
    texts[:, : out.shape[1]] = out
    return texts


def test_a_relative_computes_what_transformers_computes(model, tmp_path):
    model.save_pretrained(tmp_path / "theirs")
    params, config = huggingface.load(tmp_path / "theirs")
    inputs, targets = batch_of(config)
    logits = their_logits(model, inputs, targets)
    batch = {"inputs": inputs, "targets": targets}
    ours = jax.jit(Transformer(config).apply)({"params": params}, batch)
    np.testing.assert_allclose(ours, logits, atol=1e-4)

    for search in (GREEDY, Beam(3, 0.0)):
        texts = generate(params, config, inputs, max_length=LENGTH, search=search)
        expected = their_texts(model, inputs, search.num_beams)
        # At the greatest length Transformers' beam search prefers a better unfinished text to a
        # finished one, and T5's does not. In all other rows they agree.
        ended = [(x == config.eos_token_id).any(1) for x in (texts, expected)]
        alike = ended[0] == ended[1]
        assert alike.all() if search is GREEDY else alike.sum() >= 4
        np.testing.assert_array_equal(texts[alike], expected[alike])

    huggingface.save(params, config, tmp_path / "ours")
    back = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours").eval()
    np.testing.assert_allclose(their_logits(back, inputs, targets), logits, atol=1e-5)
    assert huggingface.load(tmp_path / "ours")[1] == config


@pytest.mark.parametrize("name", huggingface.COPIES)
def test_a_tied_embedding_is_found_under_the_names_that_transformers_finds_it_under(tmp_path, name):
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**SIZES))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[name] = tensors.pop("shared.weight")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})

    back = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    params, _ = huggingface.load(tmp_path)
    np.testing.assert_array_equal(params["embedding"], back.shared.weight.detach())
    np.testing.assert_array_equal(params["embedding"], back.lm_head.weight.detach())


def test_every_activation_is_that_of_transformers():
    x = np.linspace(-12, 12, 97, dtype=np.float32)
    taken = set()
    for name in set(transformers.activations.ACT2FN) - {"prelu", "xielu"}:
        for proj in (name, f"gated-{name}"):
            config = transformers.T5Config(**SIZES, feed_forward_proj=proj)
            ours = activations.activation({"feed_forward_proj": proj}, "relu")
            expected = transformers.activations.ACT2FN[config.dense_act_fn](torch.tensor(x))
            np.testing.assert_allclose(function(ours)(x), expected, atol=1e-5)
            assert is_gated(ours) == config.is_gated_act
            taken.add(ours.removeprefix(GATED))
    assert taken == set(FUNCTIONS)


GATED_1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
# What the published config.json of each says, in the order d_model, d_ff, d_kv, heads, layers,
# decoder layers, vocabulary.
PUBLISHED = {
    "google/ul2": (
        "t5",
        (4096, 16384, 256, 16, 32, 32, 32128),
        {"feed_forward_proj": "gated-silu"},
    ),
    "google/umt5-base": ("umt5", (768, 2048, 64, 12, 12, 12, 256384), GATED_1_1),
    "EleutherAI/pile-t5-base": ("umt5", (768, 2048, 64, 12, 12, 12, 32128), GATED_1_1),
    "google/madlad400-3b-mt": ("t5", (1024, 8192, 128, 16, 32, 32, 256000), GATED_1_1 | OTHER_IDS),
    "google/byt5-small": ("t5", (1472, 3584, 64, 6, 12, 4, 384), GATED_1_1),
    "Salesforce/codet5p-220m": ("t5", (768, 3072, 64, 12, 12, 12, 32100), {"eos_token_id": 2}),
}
KEYS = ("d_model", "d_ff", "d_kv", "num_heads", "num_layers", "num_decoder_layers", "vocab_size")


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_tensor_of_a_published_model_has_its_place(name):
    kind, sizes, others = PUBLISHED[name]
    hf_config = dict(zip(KEYS, sizes, strict=True)) | others
    config = to_config(hf_config | {"model_type": kind})
    ours = {}
    for parameter, shape in pieces.shapes(config).items():
        layer = shape[1:] if names.is_stacked(parameter) else shape
        tensors = names.theirs(parameter, shape, config)
        ours |= dict.fromkeys(tensors, names.their_shape(parameter, layer))

    # On this device a model has shapes and no numbers.
    with torch.device("meta"):
        classes = transformers.AutoConfig.for_model(kind, **hf_config)
        model = transformers.AutoModelForSeq2SeqLM.from_config(classes)
    theirs = {n: tuple(x.shape) for n, x in model.state_dict().items()}
    assert theirs | ours == theirs
    assert theirs.keys() - ours.keys() <= {*huggingface.COPIES}

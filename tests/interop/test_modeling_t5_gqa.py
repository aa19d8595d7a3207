"""Every folder that `export` writes runs in Transformers and equals our network.

The class of ours in a grouped folder is loaded as a user would, from the folder. One test per
property, over networks with every kind of KV heads.
"""

import importlib.util
import json

import jax
import numpy as np
import pytest

import gqa
from gqa.conversion import convert
from gqa.inference.decoding import GREEDY, Beam
from gqa.interop import huggingface
from gqa.interop.huggingface.config import MODELING_FILE
from gqa.kv_cache import kv_cache_bytes, presets
from gqa.model.transformer import Transformer
from tests.inference.test_generator import golden, trained  # noqa: F401 - fixtures

pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("torch", "transformers")),
    reason="compares with torch and transformers",
)

# KV heads of the golden network, which has 4 heads and 2 decoder layers.
GROUPED = {
    "mqa": {"self_attention": 1, "cross_attention": 1},
    "by layer": {"self_attention": (4, 1), "cross_attention": (1, 2), "encoder": 2},
}
FOLDERS = {"multi-head": 4, **GROUPED, "expanded": GROUPED["by layer"]}


@pytest.fixture(scope="module", autouse=True)
def one_thread_and_a_cache_of_its_own(tmp_path_factory):
    """Transformers copies the classes of a folder into a cache, by default in the home folder."""
    import torch
    from transformers import dynamic_module_utils

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the networks are too small for more
    with pytest.MonkeyPatch.context() as patched:
        modules = str(tmp_path_factory.mktemp("modules"))
        patched.setattr(dynamic_module_utils, "HF_MODULES_CACHE", modules)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):  # noqa: F811
    """A function: the network of a name in FOLDERS, its config, and the folder it was saved to."""

    def export(name):
        params, config, _ = convert(*trained, FOLDERS[name])
        folder = tmp_path_factory.mktemp("exported")
        huggingface.save(params, config, folder, expand=name.startswith("expanded"))
        return params, config, folder

    return export


def open_model(folder, **options):
    import transformers

    if (folder / MODELING_FILE).exists():
        options["trust_remote_code"] = True
    return transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, **options).eval()


def logits_of(model, inputs, targets):
    from tests import make_golden

    return make_golden.compute_logits(model, inputs, targets)


def texts_of(model, inputs, num_beams, **options):
    import torch

    tokens = torch.tensor(inputs).long()
    options |= {"num_beams": num_beams, "max_new_tokens": 8, "do_sample": False}
    options |= {"length_penalty": 0.0} if num_beams > 1 else {}
    return model.generate(tokens, attention_mask=(tokens > 0).long(), **options)[:, 1:].numpy()


@pytest.mark.parametrize("name", FOLDERS)
def test_transformers_runs_it_as_we_do(name, exported, golden):  # noqa: F811
    """Logits, greedy and beam search of padded inputs, with either attention of Transformers.

    The texts do not end, because Transformers has other rules of when a beam search is complete.
    """
    params, config, folder = exported(name)
    inputs, targets = golden["inputs"][:6], golden["greedy"][:6]
    assert (inputs == 0).any()
    batch = {"inputs": inputs, "targets": targets}
    expected = np.asarray(jax.jit(Transformer(config).apply)({"params": params}, batch))

    models = [open_model(folder, attn_implementation=each) for each in ("sdpa", "eager")]
    for model in models:
        logits = logits_of(model, inputs, targets)
        assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()

    texts = {}
    for search in (GREEDY, Beam(num_beams=4, length_penalty=0.0)):
        num_beams = getattr(search, "num_beams", 1)
        ours = gqa.generate(params, config, inputs, max_length=8, search=search, stop=False)
        texts[num_beams] = ours
        for model in models:
            theirs = texts_of(model, inputs, num_beams, eos_token_id=None)
            np.testing.assert_array_equal(theirs, ours)
    assert (texts[1] != texts[4]).any()


def test_texts_end_as_those_of_transformers_own_t5(exported, golden):  # noqa: F811
    inputs = golden["inputs"]
    grouped, expanded = (open_model(exported(name)[2]) for name in ("by layer", "expanded"))
    for num_beams in (1, 4):
        expected = texts_of(expanded, inputs, num_beams)
        np.testing.assert_array_equal(texts_of(grouped, inputs, num_beams), expected)
        assert (expected == 1).any()
        assert len(np.unique(expected)) > 5


@pytest.mark.parametrize("name", FOLDERS)
def test_its_cache_is_as_large_as_the_calculator_says(name, exported):
    import torch

    _, config, folder = exported(name)
    batch, inputs, targets = 3, 11, 7
    expected = kv_cache_bytes(config, batch, inputs, targets)
    if name.startswith("expanded"):
        expected = kv_cache_bytes(huggingface.open_folder(folder).config, batch, inputs, targets)
        assert expected > kv_cache_bytes(config, batch, inputs, targets)
    assert batch * presets.find(str(folder)).cache_bytes(targets, inputs, 4) == expected

    tokens = torch.ones(batch, inputs, dtype=torch.long)
    with torch.no_grad():
        model = open_model(folder)
        cache = model(input_ids=tokens, decoder_input_ids=tokens[:, :targets]).past_key_values
    layers = cache.self_attention_cache.layers + cache.cross_attention_cache.layers
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) == expected


@pytest.mark.parametrize("name", GROUPED)
def test_it_is_read_back_grouped_also_from_transformers_own_copy(name, exported, tmp_path):
    params, config, folder = exported(name)
    open_model(folder).save_pretrained(tmp_path)
    assert (tmp_path / MODELING_FILE).read_bytes() == (folder / MODELING_FILE).read_bytes()
    for each in (folder, tmp_path):
        back, back_config = huggingface.load(each)
        assert back_config == config
        jax.tree.map(np.testing.assert_array_equal, back, params)
    assert type(open_model(tmp_path)).__name__ == "T5GQAForConditionalGeneration"


def test_without_trust_it_is_refused_and_never_loaded_as_another_network(exported):
    import transformers

    _, _, folder = exported("mqa")
    for load in (transformers.AutoConfig, transformers.AutoModelForSeq2SeqLM):
        with pytest.raises(ValueError, match="`trust_remote_code=True`"):
            load.from_pretrained(folder, trust_remote_code=False)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        transformers.T5ForConditionalGeneration.from_pretrained(folder)

    # A folder whose class was left behind is no T5 to Transformers either.
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="t5_gqa"):
        transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_it_trains_with_and_without_activation_checkpointing(attention, exported, golden):  # noqa: F811
    import torch

    _, _, folder = exported("by layer")
    inputs, labels = (torch.tensor(golden[name][:4]).long() for name in ("inputs", "greedy"))
    gradients = []
    for checkpointing in (False, True):
        model = open_model(folder, attn_implementation=attention).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(input_ids=inputs, attention_mask=(inputs > 0).long(), labels=labels).loss.backward()
        gradients.append({n: x.grad for n, x in model.named_parameters()})
    assert all(grad is not None and grad.abs().max() > 0 for grad in gradients[0].values())
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, msg=name)


def test_it_runs_in_half_precision_and_with_a_cache_of_fixed_size(exported, golden):  # noqa: F811
    import torch

    _, _, folder = exported("by layer")
    inputs = torch.tensor(golden["inputs"][:4]).long()
    options = {"attention_mask": (inputs > 0).long(), "max_new_tokens": 8, "do_sample": False}
    model = open_model(folder)
    expected = model.generate(inputs, **options)
    static = model.generate(inputs, **options, cache_implementation="static", disable_compile=True)
    np.testing.assert_array_equal(static, expected)
    for dtype in (torch.bfloat16, torch.float16):
        half = open_model(folder, dtype=dtype)
        with torch.no_grad():
            logits = half(input_ids=inputs, decoder_input_ids=expected).logits.float()
            reference = model(input_ids=inputs, decoder_input_ids=expected).logits
        assert (logits - reference).abs().max() < 0.05 * reference.abs().max()


def test_a_new_model_begins_as_transformers_begins_t5(exported):
    """Random weights of the new attentions have T5's scale; bad numbers of heads are refused."""
    import torch
    import transformers

    _, _, folder = exported("mqa")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    torch.manual_seed(0)
    sizes = {"d_model": 256, "d_kv": 64, "vocab_size": 40}
    for name, value in sizes.items():
        setattr(config, name, value)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config, trust_remote_code=True)
    attention = model.decoder.block[1].layer[1].EncDecAttention
    assert attention.k.weight.shape == (64, 256)
    assert attention.k.weight.std().item() == pytest.approx(256**-0.5, rel=0.05)
    assert attention.q.weight.std().item() == pytest.approx((256 * 64) ** -0.5, rel=0.05)

    for wrong in (3, [2, 1, 1], [2]):
        config.cross_num_key_value_heads = wrong
        with pytest.raises(
            ValueError, match=r"cross_num_key_value_heads=.* divisor of num_heads=4"
        ):
            transformers.AutoModelForSeq2SeqLM.from_config(config, trust_remote_code=True)

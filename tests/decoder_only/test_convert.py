"""Decoder-only checkpoints: what Transformers makes of the converted one, and what is refused."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from gqa.decoder_only import convert
from gqa.interop import safetensors_files
from gqa.interop.safetensors_files import Tensors
from gqa.runtime.errors import UserError
from tests.support.llama_folders import SIZES, D, H, L, N, write_llama

ROOT = Path(__file__).parent.parent.parent
needs_torch = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("torch", "transformers")),
    reason="compares with torch and transformers",
)
MODELS = {
    "llama": ("LlamaForCausalLM", {"head_dim": H}),
    "mistral": ("MistralForCausalLM", {"head_dim": H}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "phi": ("PhiForCausalLM", {}),
}


def build(kind, kv_heads=N):
    """A random model of Transformers; its biases are no zeros."""
    import torch
    import transformers

    name, more = MODELS[kind]
    if kind == "phi":
        more = {"hidden_size": N * 16}  # half of 16 numbers a head are turned
    torch.manual_seed(0)
    settings = transformers.AutoConfig.for_model(
        kind, **SIZES | {"num_key_value_heads": kv_heads} | more
    )
    model = getattr(transformers, name)(settings).eval()
    with torch.no_grad():
        for key, x in model.named_parameters():
            x.normal_(std=0.3 if "proj" in key or "dense" in key else 0.5)
    return model


def logits(model):
    import torch

    with torch.no_grad():
        tokens = torch.tensor(np.random.default_rng(0).integers(1, 64, (2, 9)))
        return model(tokens, use_cache=False).logits.float().numpy()


def read_back(folder):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return model.eval()


def attentions(model):
    return [layer.self_attn for layer in model.model.layers]


def change(attention, role, function):
    """`function` on an attention's weight and bias by head, [heads, H, inputs]."""
    import torch

    linear = getattr(attention, role)
    for x in (linear.weight, linear.bias):
        if x is not None:
            heads = x.detach().numpy().reshape(-1, attention.head_dim, *x.shape[1:])
            with torch.no_grad():
                x.copy_(torch.tensor(function(heads)).reshape(x.shape))


def error(ours, theirs):
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


@needs_torch
@pytest.mark.parametrize("method", ["mean", "first"])
@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [("llama", 8, 2), ("llama", 4, 2), ("mistral", 4, 1), ("qwen2", 8, 4), ("phi", 8, 1)],
)
def test_logits_are_those_of_heads_that_repeat_their_group(kind, before, after, method, tmp_path):
    model = build(kind, before)
    model.save_pretrained(tmp_path / "a", max_shard_size="20KB")
    convert.convert(tmp_path / "a", tmp_path / "b", after, method)

    def repeated(heads):
        groups = heads.reshape(after, before // after, *heads.shape[1:])
        one = groups.mean(1, keepdims=True) if method == "mean" else groups[:, :1]
        return np.broadcast_to(one, groups.shape)

    for attention in attentions(model):
        change(attention, "k_proj", repeated)
        change(attention, "v_proj", repeated)
    new = read_back(tmp_path / "b")
    assert new.config.num_key_value_heads == after
    assert attentions(new)[0].k_proj.weight.shape[0] == after * attentions(new)[0].head_dim
    assert error(logits(new), logits(model)) < 1e-5
    assert error(logits(build(kind, before)), logits(model)) > 1e-2  # else nothing was tested


def turned(heads, rng, rotary):
    """The first of the heads of each pair, and itself turned as RoPE allows."""
    half, first = rotary // 2, heads[::2]
    angle = rng.uniform(-3, 3, (len(first), half))
    cos, sin = (f(angle).reshape(*angle.shape, *(1,) * (heads.ndim - 2)) for f in (np.cos, np.sin))
    x, y, rest = first[:, :half], first[:, half:rotary], first[:, rotary:]
    rotation = np.linalg.qr(rng.normal(size=(len(first), rest.shape[1], rest.shape[1])))[0]
    other = np.concatenate(
        [cos * x - sin * y, sin * x + cos * y, np.einsum("GHI,GI...->GH...", rotation, rest)], 1
    )
    return np.stack([first, other], 1).reshape(heads.shape)


@needs_torch
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("before", [8, 4])
def test_svd_is_exact_for_keys_turned_within_pairs_and_values_of_one_space(kind, before, tmp_path):
    model, H = build(kind, before), 16 if kind == "phi" else 8 if kind != "qwen2" else D // N
    for i, attention in enumerate(attentions(model)):
        maps = np.random.default_rng(i).normal(size=(before // 2, H, H))

        def mapped(heads, maps=maps):
            other = np.einsum("GHI,GI...->GH...", maps, heads[::2])
            return np.stack([heads[::2], other], 1).reshape(heads.shape)

        # The same turns for weight and bias.
        change(
            attention,
            "k_proj",
            lambda x, i=i: turned(x, np.random.default_rng(i), H // 2 if kind == "phi" else H),
        )
        change(attention, "v_proj", mapped)
    model.save_pretrained(tmp_path / "a", max_shard_size="20KB")
    said = []
    convert.convert(tmp_path / "a", tmp_path / "b", before // 2, "svd", said.append)
    assert error(logits(read_back(tmp_path / "b")), logits(model)) < 1e-4
    assert "all: keys svd 0.0000, keys mean 0." in said[-1]
    assert ", values svd 0.0000, values mean 0." in said[-1]


def read_all(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_other_tensors_and_files_are_untouched_and_dtypes_kept(tmp_path, dtype):
    import ml_dtypes

    dtype = getattr(ml_dtypes, dtype, None) or getattr(np, dtype)
    counts = np.arange(3, dtype=np.int64)
    state = write_llama(tmp_path / "a", dtype=dtype, change={"model.counts": counts})
    convert.convert(tmp_path / "a", tmp_path / "b", 4)
    new = read_all(tmp_path / "b")
    assert new.keys() == state.keys()
    for name, x in state.items():
        assert new[name].dtype == x.dtype
        if "k_proj" in name or "v_proj" in name:
            x = x.astype(np.float64).reshape(4, 2, H, D).mean(1).reshape(-1, D).astype(dtype)
        np.testing.assert_array_equal(new[name], x)
    index = json.loads((tmp_path / "b" / safetensors_files.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in new.values())
    assert index["weight_map"].keys() == new.keys()
    assert (tmp_path / "b" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "b" / "pytorch_model.bin").exists()
    assert not list((tmp_path / "b").glob("*.tmp"))


def test_a_killed_conversion_goes_on_where_it_was(tmp_path, monkeypatch):
    write_llama(tmp_path / "a")
    said = []
    convert.convert(tmp_path / "a", tmp_path / "whole", 2, "svd", said.append)

    class Killed(BaseException):
        pass

    write = safetensors_files.write

    def second(path, *args):
        if path.name.startswith("model-00002"):
            path.with_name(f"{path.name}.tmp").write_bytes(b"half")
            raise Killed
        return write(path, *args)

    monkeypatch.setattr(safetensors_files, "write", second)
    with pytest.raises(Killed):
        convert.convert(tmp_path / "a", tmp_path / "b", 2, "svd")
    assert not (tmp_path / "b" / "config.json").exists()
    monkeypatch.setattr(safetensors_files, "write", write)
    for other in ((4, "svd"), (2, "mean")):
        with pytest.raises(UserError, match="holds something else; name a new or empty folder"):
            convert.convert(tmp_path / "a", tmp_path / "b", *other)
    again = []
    convert.convert(tmp_path / "a", tmp_path / "b", 2, "svd", again.append)
    assert [len(said), len(again)] == [4, 3]  # a file was not done again
    assert again[-1] == said[-1]
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "b" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("method", ["svd", "mean", "first"])
def test_errors_printed_are_those_of_the_weights(tmp_path, method):
    state = write_llama(tmp_path / "a", 4)
    said = []
    convert.convert(tmp_path / "a", tmp_path / "b", 2, method, said.append)
    groups = [
        state[f"model.layers.{i}.self_attn.v_proj.weight"].reshape(2, 2, H, D).astype(np.float64)
        for i in range(L)
    ]
    mean = sum(np.square(x - x.mean(1, keepdims=True)).sum() for x in groups)
    best = sum(
        np.square(np.linalg.svd(group.reshape(-1, D))[1][H:]).sum() for x in groups for group in x
    )
    first = sum(np.square(x - x[:, :1]).sum() for x in groups)
    norm = sum(np.square(x).sum() for x in groups)
    total = said[-1].splitlines()[-1]
    assert f"values mean {mean / norm:.4f}" in total
    assert (f"values svd {best / norm:.4f}" in total) == (method == "svd")
    assert (f"values first {first / norm:.4f}" in total) == (method == "first")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("model.layers.0.self_attn.q_norm.weight", "of an attention is not understood"),
        ("model.layers.1.self_attn.qkv_proj.weight", "of an attention is not understood"),
        ("transformer.h.0.attn.c_attn.weight", "of an attention is not understood"),
        ("model.layers.0.self_attn.k_proj.weight_scale", "of an attention is not understood"),
        ("model.layers.2.self_attn.k_proj.weight", "is one too many"),
        ("model.layers.0.self_attn.k_proj.bias", r"has shape \(1,\), expected \(64,\)"),
    ],
)
def test_a_tensor_that_is_not_understood_is_named(tmp_path, name, why):
    write_llama(tmp_path / "a", change={name: np.zeros(1, np.float32)})
    with pytest.raises(UserError, match=rf"index\.json: tensor {name} {why}"):
        convert.convert(tmp_path / "a", tmp_path / "b", 2)
    assert not (tmp_path / "b").exists()


def test_a_missing_tensor_or_whole_numbers_are_named(tmp_path):
    name = "model.layers.1.self_attn.v_proj.weight"
    write_llama(tmp_path / "a", change={name: None})
    with pytest.raises(UserError, match=f"tensor {name} is missing"):
        convert.convert(tmp_path / "a", tmp_path / "b", 2)
    write_llama(tmp_path / "c", change={name: np.zeros((N * H, D), np.int8)})
    with pytest.raises(UserError, match=f"tensor {name} has dtype I8; use one of"):
        convert.convert(tmp_path / "c", tmp_path / "b", 2)


@pytest.mark.parametrize(
    ("more", "kv_heads", "method", "message"),
    [
        ({}, 3, "mean", "num_kv_heads=3 does not divide num_key_value_heads=8; use one of 1, 2"),
        ({}, 2, "median", "method='median'; use one of mean, first, svd"),
        ({"model_type": "cohere"}, 2, "svd", "model_type='cohere'; use mean or first"),
        ({"is_encoder_decoder": True}, 2, "mean", "is_encoder_decoder is set"),
        ({"quantization_config": {"a": 1}}, 2, "mean", "quantization_config is set"),
        ({"num_attention_heads": None}, 2, "mean", "num_attention_heads=None; use a whole"),
        ({"partial_rotary_factor": 0.5}, 2, "svd", "partial_rotary_factor=0.5 is ignored by"),
        (
            {"partial_rotary_factor": 0.1, "model_type": "phi"},
            *(2, "svd", "partial_rotary_factor=0.1 gives no pairs"),
        ),
        ({"num_hidden_layers": 2**30}, 2, "mean", r"layers\.2\.self_attn\.q_proj\.weight is miss"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, more, kv_heads, method, message):
    write_llama(tmp_path / "a", **more)
    with pytest.raises(UserError, match=message):
        convert.convert(tmp_path / "a", tmp_path / "b", kv_heads, method)
    assert not (tmp_path / "b").exists()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    write_llama(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").write_text("")
    for target, message in (("a", "is the model itself"), ("b", "holds something else")):
        with pytest.raises(UserError, match=message):
            convert.convert(tmp_path / "a", tmp_path / target, 2)
    with pytest.raises(UserError, match=r"model\.safetensors: No such file"):
        convert.convert(tmp_path / "b", tmp_path / "c", 2)


def test_the_command(tmp_path):
    write_llama(tmp_path / "a")
    command = [sys.executable, "-m", "gqa", "convert", tmp_path / "a", tmp_path / "b"]
    done = subprocess.run([*command, "--num-kv-heads=2"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "8 -> 2 KV heads, mean" in done.stdout
    assert len(Tensors(tmp_path / "b")) == 11

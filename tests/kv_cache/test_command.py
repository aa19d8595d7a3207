"""The cache of known decoders, by worked examples."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

import gqa
from gqa.__main__ import run_command
from gqa.kv_cache import command
from gqa.kv_cache.presets import PRESETS, find
from gqa.model.config import Config
from gqa.runtime.errors import UserError

ROOT = Path(__file__).parent.parent.parent


def table(capsys, *arguments):
    """The printed rows by KV heads, and the last line."""
    run_command(["kv-cache", *arguments])
    lines = capsys.readouterr().out.splitlines()
    return {line.split()[0]: line.split()[1:] for line in lines[2:-1]}, lines[-1]


def test_8_heads_of_1000_tokens_are_16000_vectors_a_layer(capsys, tmp_path):
    """A key and a value for each head and token; one head keeps an eighth."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "gpt2", "n_layer": 6, "n_head": 8, "n_embd": 512}))
    rows, _ = table(capsys, str(path), "--length=1000")
    assert rows["8*"][0] == "16,000"
    assert rows["1"][0] == "2,000"


def test_llama_2_70b_keeps_8_times_less_than_multi_head(capsys):
    """64 query heads, 8 KV heads: 320 KiB a token in 16 bits, 2.5 MiB with 64."""
    rows, answer = table(capsys, "llama-2-70b", "--length=4096", "--batch=4", "--memory=40")
    assert rows["8*"] == ["65,536", "1.25", "GiB", "5.00", "GiB", "1/8", "32"]
    assert rows["64"] == ["524,288", "10.00", "GiB", "40.00", "GiB", "1/1", "4"]
    assert answer == "8 KV heads: 8 times less cache than 64; 32 sequences in 40 GiB instead of 4"
    assert PRESETS["Llama-2-70B"].cache_bytes(1, 0, 2) == 320 * 2**10


def test_llama_2_7b_gains_a_factor_of_4_at_8_heads(capsys):
    """Multi-head: 512 KiB a token, 2 GiB for 4096 tokens."""
    rows, answer = table(capsys, "Llama-2-7B", "--length=4096", "--memory=16.5")
    assert rows["32*"][1:3] == ["2.00", "GiB"]
    assert answer == "8 KV heads: 4 times less cache than 32; 33 sequences in 16.5 GiB instead of 8"


def test_t5_xxl_keeps_inputs_too_and_agrees_with_the_library(capsys):
    arguments = ("T5-XXL", "--length=512", "--inputs-length=2048")
    rows, answer = table(capsys, *arguments)
    assert rows["64*"][1:3] == ["960.00", "MiB"]
    assert answer == "8 KV heads: 8 times less cache than 64"
    heads = dict.fromkeys(
        ("num_kv_heads_encoder", "num_kv_heads_self_attention", "num_kv_heads_cross_attention"), 64
    )
    config = Config(32128, 4096, 10240, 64, 64, 24, 24, **heads)
    for dtype in ("float32", "bfloat16"):
        ours = PRESETS["T5-XXL"].cache_bytes(512, 2048, jnp.dtype(dtype).itemsize)
        assert ours == gqa.kv_cache_bytes(config, 1, 2048, 512, dtype)


PER_TOKEN = {  # KiB of one position in 16 bits, of the published networks
    "T5-small": 12,
    "T5-base": 36,
    "T5-large": 96,
    "T5-XL": 192,
    "T5-XXL": 384,
    "Llama-2-7B": 512,
    "Llama-2-13B": 800,
    "Llama-2-34B": 192,
    "Llama-2-70B": 320,
    "Llama-3-8B": 128,
    "Llama-3-70B": 320,
    "Llama-3-405B": 504,
    "Mistral-7B": 128,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_take_what_their_networks_do(name):
    decoder = PRESETS[name]
    assert decoder.cache_bytes(1, 0, 2) == PER_TOKEN[name] * 1024
    # Of an encoder's outputs it keeps as much again, if there is one.
    both = decoder.cache_bytes(3, 5, 2)
    assert both == PER_TOKEN[name] * 1024 * (8 if name.startswith("T5") else 3)


def test_inputs_are_as_long_as_the_decoder_unless_told(capsys):
    rows, _ = table(capsys, "T5-XL", "--length=100")
    same, _ = table(capsys, "T5-XL", "--length=100", "--inputs-length=100")
    assert rows == same
    assert rows["32*"][0] == f"{2 * 32 * 200:,}"
    run_command(["kv-cache", "T5-XL", "--length=100", "--inputs-length=30", "--batch=3"])
    assert capsys.readouterr().out.splitlines()[0] == (
        "24 layers, 32 heads of 64, bfloat16, 100 positions after 30 of input, batch 3"
    )


def test_units_follow_the_size(capsys):
    rows, _ = table(capsys, "T5-small", "--length=1", "--inputs-length=1")
    assert rows["6*"][1:5] == ["24.00", "KiB", "24.00", "KiB"]
    rows, _ = table(capsys, "Llama-2-7B", "--length=2", "--batch=1024")
    assert rows["32*"][1:5] == ["1.00", "MiB", "1.00", "GiB"]


def write(folder, **config):
    """A folder with this config.json."""
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_a_window_bounds_the_cache_of_the_layers_that_have_it(capsys, tmp_path):
    """Mistral has it in all layers, Gemma 2 in every other one."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    sizes |= {"hidden_size": 32, "head_dim": 8, "sliding_window": 100}
    rows, _ = table(capsys, write(tmp_path, model_type="mistral", **sizes), "--length=1000")
    assert rows["4*"][0] == "800"  # 2 x 4 x 100
    rows, _ = table(capsys, str(tmp_path), "--length=30")
    assert rows["4*"][0] == "240"  # shorter than the window
    run_command(["kv-cache", write(tmp_path, model_type="gemma2", **sizes), "--length=1000"])
    title, _, row, *_ = capsys.readouterr().out.splitlines()
    assert title.endswith("1000 positions in a window of 100 in 1 layers, batch 1")
    assert row.split()[:3] == ["4*", f"{2 * 4 * 8 * (100 + 1000) * 2 / 1024:.2f}", "KiB"]


def test_layers_without_a_cache_count_no_bytes(capsys, tmp_path):
    """Of Jamba's 32 layers 4 have attention: 8 KV heads of 128, 16 KiB a token."""
    run_command(["kv-cache", write(tmp_path, model_type="jamba"), "--length=1024"])
    text = capsys.readouterr().out
    assert text.startswith("32 layers, 32 heads of 128, 4 attentions with a cache, ")
    assert "8*           16,384   16.00 MiB" in text.replace("65,536", "16,384")
    assert "28 layers keep a state of a fixed size instead, not counted here" in text


def test_latent_attention_has_one_row(capsys, tmp_path):
    """DeepSeek-V3 keeps 512 + 64 numbers a layer and position, not 128 x (192 + 128)."""
    run_command(["kv-cache", write(tmp_path, model_type="deepseek_v3"), "--length=1"])
    _, _, row, last = capsys.readouterr().out.splitlines()
    assert row.split()[:3] == ["latent*", f"{61 * 576 * 2 / 1024:.2f}", "KiB"]
    assert last.startswith(f"latent attention: {128 * 320 / 576:.1f} times less cache than 128 ")


def test_different_heads_of_self_and_cross_attention_are_a_row(capsys, tmp_path):
    """The config.json that export writes: 2 self-attention heads, other ones by layer in cross."""
    heads = {"num_key_value_heads": 2, "cross_num_key_value_heads": [1, 8, 4]}
    folder = write(tmp_path, model_type="t5", num_layers=3, num_heads=8, d_kv=4, **heads)
    arguments = ["kv-cache", folder, "--length=10", "--inputs-length=100", "--dtype=float32"]
    run_command(arguments)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    vectors = 2 * (3 * 2 * 10 + 13 * 100)
    assert rows[0] == [*["as", "is*"], *[f"{vectors * 4 * 4 / 1024:.2f}", "KiB"] * 2, "1/1.9"]
    assert rows[1][:2] == ["8", f"{2 * 3 * 8 * 110 * 16 / 1024:.2f}"]


def test_whispers_encoder_has_its_own_length(capsys, tmp_path):
    folder = write(tmp_path, model_type="whisper")
    rows, _ = table(capsys, folder, "--length=100")
    assert rows["6*"][0] == f"{2 * 6 * 1600:,}"
    run_command(["kv-cache", folder, "--length=100", "--inputs-length=1500"])
    with pytest.raises(UserError, match="--inputs-length=100 but the encoder has 1500 positions"):
        run_command(["kv-cache", folder, "--length=100", "--inputs-length=100"])
    with pytest.raises(UserError, match="--inputs-length=100 but there is no encoder; leave it"):
        run_command(["kv-cache", "Llama-2-7B", "--inputs-length=100"])


def test_a_null_contradicts_no_other_name_of_a_size(tmp_path):
    sizes = {"num_hidden_layers": None, "n_layer": 12, "num_attention_heads": 4, "d_model": None}
    folder = write(tmp_path, model_type="llama", hidden_size=64, num_key_value_heads=2, **sizes)
    decoder = find(folder)
    assert (decoder.layers, decoder.heads, decoder.kv_heads) == (12, 4, 2)
    write(tmp_path, model_type="llama", num_hidden_layers=3, n_layer=12)
    with pytest.raises(UserError, match="num_hidden_layers=3 and n_layer=12 are names of one size"):
        find(folder)
    write(tmp_path, model_type="llama", num_hidden_layers=None)
    with pytest.raises(UserError, match="num_hidden_layers=None; use a whole number"):
        find(folder)


def test_an_image_fixes_the_positions_of_llama_with_vision(capsys, tmp_path):
    """560 / 14 = 40 patches a side and one position for the tile, in 4 tiles."""
    vision = {"image_size": 560, "patch_size": 14, "max_num_tiles": 4}
    folder = write(tmp_path, model_type="mllama", text_config={}, vision_config=vision)
    run_command(["kv-cache", folder, "--length=1000"])
    said = capsys.readouterr().out
    assert "40 layers, 32 heads of 128, 8 of them attend to the input alone, bfloat16" in said
    assert "vectors" not in said
    assert "1000 positions after 6404 of input" in said
    assert "the input is one image in all of its tiles" in said
    decoder = find(folder)
    assert decoder.cache_bytes(1000, 1, 2) == 2 * 2 * 8 * 128 * (32 * 1000 + 8 * 6404)
    for fault in ({"image_size": "560"}, {"max_num_tiles": 0}, {"patch_size": None}):
        write(tmp_path, model_type="mllama", text_config={}, vision_config=vision | fault)
        with pytest.raises(UserError, match=next(iter(fault))):
            find(folder)


def test_the_object_of_the_decoder_counts_alone(tmp_path):
    """Sizes that it leaves out are its class's, not those of the object around it."""
    folder = write(
        tmp_path,
        model_type="gemma3",
        num_hidden_layers=3,
        num_attention_heads=2,
        text_config={"num_hidden_layers": 12, "sliding_window": 9},
    )
    decoder = find(folder)
    assert (decoder.layers, decoder.heads, decoder.kv_heads) == (12, 8, 4)
    assert [layer.window for layer in decoder.self_attention] == [*[9] * 5, 0] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["gpt-5"],
            "'gpt-5' is no config.json (No such file or directory); use the path of one, or",
        ),
        (["T5-XL", "--batch=0"], "--batch=0; use more than 0"),
        (["T5-XL", f"--batch={10**12 + 1}"], "--batch=1000000000001; use more than 0"),
        (["T5-XL", "--inputs-length=0"], "--inputs-length=0; use more than 0"),
        (["T5-XL", "--memory=0"], "--memory=0.0; use more than 0"),
        (["T5-XL", "--memory=nan"], "--memory=nan; use more than 0"),
        (["T5-XL", "--dtype=float7"], "--dtype='float7'; use one of float32, "),
        (["T5-XL", "--length=x"], "argument --length: invalid int value: 'x'"),
        (["T5-XL", "--heads=2"], "unrecognized arguments: --heads=2"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(UserError) as error:
        run_command(["kv-cache", *arguments])
    assert str(error.value).startswith(message)


HINTS = {
    "cla_share_factor": 2,
    "num_kv_shared_layers": 2,
    "kv_sharing": "last",
    "use_mla": True,
    "sliding_window": 100,
    "window_size": 64,
    "layer_types": ["full_attention"] * 2,
    "attention_chunk_size": 64,
    "sliding_window_pattern": 2,
    "global_attn_every_n_layers": 4,
    "attn_layer_period": 2,
    "mamba_d_state": 16,
    "linear_attention_layers": [0],
    "multi_query_group_num": 2,
    "num_query_groups": 2,
    "n_head_kv": 1,
    "kv_channels": 64,
    "v_head_dim": 8,
    "attention_head_dim": 8,
    "num_attention_sinks": 4,
    "multi_query": True,
    "per_layer_config": {"0": {}},
    "block_configs": [],
    "kv_lora_rank": 5,
    "ssm_layers": [1],
    "encoder_layers": 3,
    "num_key_value_heads_per_layer": [1, 2],
    "skip_layers": [0],
    **dict.fromkeys(("key_dim", "value_size", "qk_dim", "dim_per_h"), 8),
    **dict.fromkeys(("num_recurrences", "total_ut_steps", "num_loops", "dilation"), 2),
}


@pytest.mark.parametrize("key", HINTS)
def test_a_field_that_may_decide_and_is_not_understood_is_refused(tmp_path, key):
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 8, "hidden_size": 64}
    folder = write(tmp_path, model_type="llama", **sizes, **{key: HINTS[key]})
    with pytest.raises(UserError, match=rf"config\.json: {key}=.* is not understood; remove it"):
        find(folder)
    for nothing in (None, False):
        assert find(write(tmp_path, model_type="llama", **sizes, **{key: nothing})).layers == 2


def test_fields_of_published_files_are_no_hints(tmp_path):
    """Those of Llama, Mixtral, DeepSeek and Gemma that say nothing about the cache."""
    harmless = {
        "attention_bias": True,
        "attention_dropout": 0.1,
        "rms_norm_eps": 1e-6,
        "use_cache": True,
        "attn_pdrop": 0.1,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "rope_scaling": {"factor": 8.0},
        "rope_theta": 5e5,
        "pretraining_tp": 1,
        "num_nextn_predict_layers": 1,
        "moe_layer_freq": 1,
        "first_k_dense_replace": 3,
        "attn_logit_softcapping": 50.0,
        "query_pre_attn_scalar": 256,
        "n_group": 8,
        "cache_implementation": "hybrid",
        "num_local_experts": 8,
        "vocab_size": 9,
        "_attn_implementation_autoset": True,
        "quantization_config": {"bits": 4},
    }
    assert find(write(tmp_path, model_type="llama", **harmless)).kv_heads == 32


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "model_type=None is none of which the KV cache is known; use one of apertus, "),
        ({"model_type": "mamba2"}, "model_type='mamba2' is none of which"),
        ({"model_type": ["llama"]}, r"model_type=\['llama'\] is none of which"),
        ({"model_type": "llava"}, "text_config is missing"),
        ({"model_type": "llava", "text_config": {"n_window": 3}}, "text_config: n_window=3 may"),
        (
            {"model_type": "llava", "text_config": {"model_type": "x"}},
            "text_config: model_type='x'",
        ),
        ({"model_type": "gpt2", "n_head": "8"}, "n_head='8'; use a whole number"),
        ({"model_type": "gpt2", "n_embd": 65, "n_head": 8}, "n_embd=65 is no multiple of 8 heads"),
        (
            {"model_type": "gpt2", "n_layer": 3, "num_hidden_layers": 4},
            "n_layer=3 and num_hidden_layers=4 are names of one size",
        ),
        (
            {"model_type": "llama", "num_key_value_heads": 3},
            "num_key_value_heads=3 does not divide",
        ),
        ({"model_type": "llama", "num_hidden_layers": 10**9}, "num_hidden_layers=1000000000; use"),
        ({"model_type": "llama", "is_encoder_decoder": True}, "is_encoder_decoder=True; a llama"),
        ({"model_type": "gpt2", "add_cross_attention": True}, "add_cross_attention=True; a gpt2"),
        ({"model_type": "bart", "is_encoder_decoder": False}, "is_encoder_decoder=False; a bart"),
        ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        (
            {"model_type": "qwen3", "layer_types": ["linear_attention"] * 32},
            "layer_types='linear_attention'; this type has full_attention, ",
        ),
        (
            {"model_type": "gemma4_text", "layer_types": ["mamba"] * 30},
            "layer_types='mamba'; this type has full_attention, sliding_attention alone",
        ),
        ({"model_type": "llama", "text_config": {"head_dim": 3}}, "text_config=.* not understood"),
        (
            {"model_type": "qwen2", "layer_types": ["lightning"] * 32},
            "layer_types='lightning'; use kinds out of full_attention, ",
        ),
        (
            {"model_type": "qwen2", "layer_types": ["sliding_attention"] * 32},
            "sliding_window=4096 but sliding_attention is listed",
        ),
        ({"model_type": "qwen2", "use_sliding_window": "no"}, "use_sliding_window='no'; use true"),
        ({"model_type": "mistral", "sliding_window": "4k"}, "sliding_window='4k'; use a whole"),
        ({"model_type": "bamba", "attn_layer_indices": []}, "num_hidden_layers=32 but none has"),
        (
            {"model_type": "t5", "num_key_value_heads": [1, 2]},
            r"num_key_value_heads=\[1, 2\]; use one number for each",
        ),
        ({"model_type": "mpt", "attn_config": {"kv_n_heads": 2}}, "attn_config=.*kv_n_heads"),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "MX"}, "hybrid_override_pattern="),
    ],
)
def test_a_config_json_that_is_not_understood_is_refused(tmp_path, config, message):
    with pytest.raises(UserError, match=rf"config\.json: {message}"):
        find(write(tmp_path, **config))


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_config_json_that_is_no_file_is_refused_at_once(tmp_path, make):
    make(tmp_path / "config.json")
    with pytest.raises(UserError, match=r"config\.json: is a device, a pipe or a socket"):
        find(str(tmp_path))


def test_addresses_and_impossible_names_are_told_what_to_do():
    with pytest.raises(UserError, match="model='gs://bucket/model' is a URL; mount"):
        find("gs://bucket/model")
    with pytest.raises(UserError, match=r"is no config\.json .*null"):
        find("a/\0")
    with pytest.raises(UserError, match=r"is no config\.json .File name too long"):
        find("a" * 300)


def test_the_command_prints_nothing_else():
    line = [sys.executable, "-m", "gqa", "kv-cache", "Mistral-7B"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("8 KV heads: 4 times less cache than 32\n")
    done = subprocess.run([*line, "--dtype=x"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --dtype='x'; use one of " + ", ".join(command.DTYPES) + "\n"

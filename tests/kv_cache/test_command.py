"""The cache of known decoders, by worked examples."""

import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

import gqa
from gqa.__main__ import run_command
from gqa.kv_cache import command
from gqa.kv_cache.presets import PRESETS, Decoder, find
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
    path.write_text(json.dumps({"n_layer": 6, "n_head": 8, "n_embd": 512}))
    rows, _ = table(capsys, str(path), "--length=1000")
    assert rows["8*"][0] == "16,000"
    assert rows["1"][0] == "2,000"


def test_llama_2_70b_keeps_8_times_less_than_multi_head(capsys):
    """64 query heads, 8 KV heads: 320 KiB a token in 16 bits, 2.5 MiB with 64."""
    rows, answer = table(capsys, "llama-2-70b", "--length=4096", "--batch=4", "--memory=40")
    assert rows["8*"] == ["65,536", "1.25", "GiB", "5.00", "GiB", "1/8", "32"]
    assert rows["64"] == ["524,288", "10.00", "GiB", "40.00", "GiB", "1/1", "4"]
    assert answer == "8 KV heads: 8 times less cache than 64; 32 sequences in 40 GiB instead of 4"
    assert command.cache_bytes(PRESETS["Llama-2-70B"], 8, 1, 0, 2) == 320 * 2**10


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
        ours = command.cache_bytes(PRESETS["T5-XXL"], 64, 512, 2048, jnp.dtype(dtype).itemsize)
        assert ours == gqa.kv_cache_bytes(config, 1, 2048, 512, dtype)


@pytest.mark.parametrize(
    ("config", "decoder"),
    [
        ({"num_hidden_layers": 2, "num_attention_heads": 8, "hidden_size": 64}, (2, 8, 8, 8)),
        (
            {
                "num_hidden_layers": 2,
                "num_attention_heads": 8,
                "num_key_value_heads": 2,
                "head_dim": 5,
                "sliding_window": 9,
                "use_sliding_window": False,
            },
            (2, 8, 2, 5),
        ),
        ({"n_layer": 3, "n_head": 4, "n_embd": 8, "multi_query": True}, (3, 4, 1, 2)),
        (
            {"text_config": {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 8}},
            (2, 2, 2, 4),
        ),
        (
            {"model_type": "mt5", "num_layers": 4, "num_heads": 2, "d_model": 8, "d_kv": 3},
            (4, 2, 2, 3, True),
        ),
        (
            {
                "is_encoder_decoder": True,
                "decoder_layers": 4,
                "decoder_attention_heads": 2,
                "d_model": 8,
            },
            (4, 2, 2, 4, True),
        ),
    ],
)
def test_what_config_json_says(tmp_path, config, decoder):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert find(str(tmp_path)) == Decoder(*decoder)


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
    assert command.cache_bytes(decoder, decoder.kv_heads, 1, 0, 2) == PER_TOKEN[name] * 1024
    # Of an encoder's outputs it keeps as much again, if there is one.
    both = command.cache_bytes(decoder, decoder.kv_heads, 3, 5, 2)
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


@pytest.mark.parametrize(
    ("more", "kv_heads"),
    [
        ({"multi_query": True, "num_kv_heads": 4}, 1),
        ({"multi_query": True, "new_decoder_architecture": True, "num_kv_heads": 4}, 4),
        ({"multi_query": False, "num_kv_heads": 4}, 4),
        ({"num_key_value_heads": 2, "num_kv_heads": 4}, 2),
        ({}, 8),
    ],
)
def test_falcons_two_ways_to_say_kv_heads(tmp_path, more, kv_heads):
    (tmp_path / "config.json").write_text(
        json.dumps({"n_layer": 2, "n_head": 8, "hidden_size": 64} | more)
    )
    assert find(str(tmp_path / "config.json")).kv_heads == kv_heads


@pytest.mark.parametrize(
    ("more", "window"),
    [
        ({"sliding_window": 9}, 9),
        ({"sliding_window": 9, "use_sliding_window": True}, 9),
        ({"sliding_window": 9, "use_sliding_window": False}, 0),
        ({"sliding_window": 9, "layer_types": ["sliding_attention"] * 2}, 9),
        ({"sliding_window": None, "layer_types": ["full_attention"] * 2}, 0),
    ],
)
def test_a_window_counts_where_all_layers_have_it(tmp_path, more, window):
    (tmp_path / "config.json").write_text(
        json.dumps({"n_layer": 2, "n_head": 8, "hidden_size": 64} | more)
    )
    decoder = find(str(tmp_path))
    assert decoder.window == window
    assert command.cache_bytes(decoder, 8, 5, 0, 2) == 2 * 2 * 8 * 8 * 5 * 2  # within the window


def test_a_window_bounds_the_cache(capsys, tmp_path):
    config = {"n_layer": 2, "n_head": 4, "n_embd": 32, "sliding_window": 100}
    (tmp_path / "config.json").write_text(json.dumps(config))
    rows, _ = table(capsys, str(tmp_path), "--length=1000")
    assert rows["4*"][0] == "800"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpt-5"], "'gpt-5' is no config.json; use one, or one of T5-small, "),
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


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kv_lora_rank": 512}, "kv_lora_rank=512: this model caches no keys and values by head"),
        (
            {
                "n_head": 8,
                "n_embd": 64,
                "n_layer": 2,
                "sliding_window": 4,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "layer_types: only some layers have the sliding_window",
        ),
        ({"n_head": "8"}, "n_head='8'; use a whole number"),
        ({"n_head": 8, "n_embd": 64}, "none of num_decoder_layers, .* is there"),
        ({"n_head": 8, "n_embd": 64, "num_kv_heads": 3}, "num_key_value_heads=3 does not divide"),
    ],
)
def test_a_config_json_that_says_something_else_is_refused(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"config\.json: {message}"):
        find(str(tmp_path))


def test_the_command_prints_nothing_else():
    line = [sys.executable, "-m", "gqa", "kv-cache", "Mistral-7B"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("8 KV heads: 4 times less cache than 32\n")
    done = subprocess.run([*line, "--dtype=x"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --dtype='x'; use one of " + ", ".join(command.DTYPES) + "\n"

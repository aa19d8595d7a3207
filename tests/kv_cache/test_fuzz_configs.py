"""Mutations of valid configs give sizes or one line about the field, never a traceback."""

import json
import random

import pytest

from gqa.decoder_only import layout
from gqa.kv_cache import command
from gqa.kv_cache.config_json import to_decoder
from gqa.kv_cache.decoder import Decoder
from gqa.kv_cache.model_types import MODEL_TYPES
from gqa.kv_cache.nested_types import NESTED
from gqa.runtime.errors import UserError

ODD = [
    *(None, True, False, 0, 1, 2, 3, 7, -1, 2**31, 2**70, 10**300, 0.5, float("nan"), float("inf")),
    *(
        "",
        "4",
        "all",
        "full_attention",
        "\x1b[0m",
        "\ud800",
        [],
        [1],
        [[1]],
        ["full_attention"] * 32,
    ),
    *(
        ["sliding_attention", 5],
        [None],
        {},
        {"0": {}},
        {"0": 3},
        {"kv_n_heads": 0},
        {"a": {"b": 1}},
    ),
]
KEYS = sorted({key for kind in MODEL_TYPES.values() for key in (*kind.defaults, *kind.harmless)})


def mutated(rng):
    """A config of a random type with up to four odd values, in an object of its own or not."""
    config = {"model_type": rng.choice([*MODEL_TYPES])}
    kind = MODEL_TYPES[config["model_type"]]
    config |= {key: value for key, value in kind.defaults.items() if rng.random() < 0.5}
    for _ in range(rng.randrange(5)):
        config[rng.choice([*kind.defaults, rng.choice(KEYS), "model_type"])] = rng.choice(ODD)
    if rng.random() < 0.2:
        outer = rng.choice([*NESTED])
        config = {"model_type": outer, NESTED[outer][0]: rng.choice([config, config, *ODD])}
    return config


@pytest.mark.parametrize("seed", range(4))
def test_mutations_give_sizes_or_one_line(seed):
    rng, known, messages = random.Random(seed), 0, []
    for _ in range(500):
        config = json.loads(json.dumps(mutated(rng)))
        try:
            decoder = to_decoder(config)
        except UserError as error:
            messages.append(str(error))
            continue
        known += 1
        assert isinstance(decoder, Decoder)
        text = command.describe(decoder, 1, 100, 50, "bfloat16", 1.0)
        assert text.count("\n") < 1000
    assert 50 < known < 450
    assert all(message.isprintable() and len(message) < 3000 for message in messages)


@pytest.mark.parametrize("method", ["mean", "svd"])
def test_mutations_of_a_folder_to_convert(method, tmp_path):
    rng, known, messages = random.Random(0), 0, []
    keys = ["partial_rotary_factor", "rope_parameters", "rope_scaling", "head_dim", "model_type"]
    for _ in range(1000):
        config = {"model_type": rng.choice(["llama", "phi"]), "hidden_size": 64}
        config |= {"num_attention_heads": 8, "num_hidden_layers": 2}
        for _ in range(rng.randrange(3)):
            config[rng.choice([*keys, *config])] = rng.choice(ODD)
        try:
            layout.read_sizes(config, 2, method, tmp_path / "config.json")
        except UserError as error:
            messages.append(str(error))
            continue
        known += 1
    assert all(message.isprintable() for message in messages)
    assert 100 < known < 900

"""Timing runs what it says it times, for each network in turn."""

import dataclasses

import numpy as np
import pytest

from gqa import timing


def test_every_network_is_timed_every_time(tiny):
    configs = {"mha": tiny, "mqa": dataclasses.replace(tiny, num_kv_heads_decoder=1)}
    shape = {"batch_size": 2, "inputs_length": 8, "targets_length": 5}
    times = timing.measure(configs, **shape, repetitions=3)
    assert times.keys() == configs.keys()
    for measured in times.values():
        assert measured.prefill.shape == measured.decode.shape == (3,)
        assert (np.concatenate(measured) > 0).all()


@pytest.mark.parametrize("repetitions", [1, 4])
def test_networks_take_turns(tiny, monkeypatch, repetitions):
    order = []

    def compiled(config, inputs, length):
        heads = config.num_kv_heads_decoder
        return lambda: order.append(("prefill", heads)), lambda memory: order.append(heads)

    monkeypatch.setattr(timing, "_compiled", compiled)
    configs = {"a": tiny, "b": dataclasses.replace(tiny, num_kv_heads_decoder=1)}
    shape = {"batch_size": 1, "inputs_length": 4, "targets_length": 2}
    timing.measure(configs, **shape, repetitions=repetitions)
    assert order == [("prefill", 4), 4, ("prefill", 1), 1] * repetitions

"""A small speed benchmark: all systems take turns, records are complete, numbers fit together."""

import numpy as np
import pytest

from configs.sweeps import speed as sweep
from experiments.pipeline import Options
from experiments.report import report
from experiments.speed import benchmark, peers
from experiments.speed import report as speed_report
from experiments.stages import timings
from gqa import kv_cache
from gqa.evaluation import results
from gqa.inference.step import Inference
from gqa.runtime import hardware
from gqa.runtime.errors import UserError

BANDWIDTH, RATE = 1e9, 2e10
REPETITIONS = 3
TINY = {"d_model": 16, "d_ff": 16, "num_heads": 4, "head_dim": 4, "vocab_size": 32}
TINY |= {"num_encoder_layers": 1, "num_decoder_layers": 1}
BATCH, LENGTH, DECODED = 2, 8, 4


def make_config():
    config = sweep.get_config().unlock()
    config.model.update(TINY)
    for network in config.training.networks.values():
        network.update(TINY)
    del config.training.networks.mini
    config.benchmark.update(kv_heads=(4, 1), batch_size=BATCH, inputs_lengths=(LENGTH,))
    config.benchmark.update(targets_length=DECODED, repetitions=REPETITIONS)
    config.training.update(batch_size=2, inputs_length=8, targets_length=6, steps=2)
    config.training.update(repetitions=REPETITIONS)
    weights = kv_cache.nbytes(kv_cache.weight_shapes(benchmark._nets(config)[4]))
    sequence = kv_cache.kv_cache_bytes(benchmark._nets(config)[4].config, 1, LENGTH, DECODED)
    config.benchmark.memory_gib = (weights + 3.5 * sequence) / 2**30
    config.benchmark.largest_batch_size = 4
    return config


@pytest.fixture(scope="module")
def config():
    return make_config()


@pytest.fixture(scope="module")
def measured(config, tmp_path_factory):
    """Run the whole benchmark with two scripted peers; return workdir, records and all turns."""
    turns = []

    def take_turns(entries, repetitions):
        turns.append((list(entries), repetitions))
        return real_take_turns(entries, repetitions)

    real_take_turns, workdir = benchmark.timing.take_turns, tmp_path_factory.mktemp("speed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardware, "read_bandwidth", lambda: BANDWIDTH)
        patch.setattr(hardware, "matmul_rate", lambda dtype: RATE)
        patch.setattr(benchmark.timing, "take_turns", take_turns)
        patch.setattr(peers, "installed", lambda: list(peers.TITLES))
        patch.setattr(peers, "missing", list)
        patch.setattr(peers, "build", scripted)
        patch.setattr(peers, "hugging_face_training", lambda *_: lambda inputs, targets: 1.0)
        benchmark.check(config)
        benchmark.run(config, workdir, None, Options())
    return workdir, results.read(workdir / "results.jsonl"), turns


def scripted(name, params, config, inputs):
    """Return a peer that always generates token 0."""
    assert (
        config.num_kv_heads_self_attention
        == config.num_kv_heads_cross_attention
        == config.num_heads
    )
    encode = (lambda: 0) if name == peers.HUGGING_FACE else None
    return peers.Peer(lambda length: np.zeros((len(inputs), length), np.int32), encode)


def rows(measured, part):
    """Return records by (system, KV heads, kind of batch) and metric."""
    by_shape = {}
    for record in measured[1]:
        v = record["variant"]
        if record["stage"] == part:
            row = by_shape.setdefault((v["system"], v["num_kv_heads"], v["batch"]), {})
            row[record["metric"]] = record
    return by_shape


def test_all_systems_take_turns(measured):
    inference, training = measured[2]
    ours = {("gqa", 4, 2), ("gqa", 4, 3), ("gqa", 1, 2), ("gqa", 1, 4)}
    others = {("hugging_face", 4, 2), ("ctranslate2", 4, 2)}
    assert {tuple(entry) for entry in inference[0]} == ours | others | {("machine", 0, 0)}
    assert {entry.system for entry in training[0]} == {"gqa", "hugging_face", "machine"}
    assert inference[1] == training[1] == REPETITIONS


def test_records_are_complete(measured):
    for record in measured[1]:
        assert record["run"] == "speed"
        assert {"stage", "task", "unit", "commit", "device", "time"} <= record.keys()
        assert record["low"] <= record["value"] <= record["high"]
        counted = record["metric"].endswith("_bytes") or record["metric"] == "same_tokens"
        assert record["n"] == (1 if counted else REPETITIONS)
    inference = rows(measured, "inference")
    ratios = {"token_ratio_mha", "token_ratio_hugging_face", "token_ratio_ctranslate2"}
    ratios.add("prefill_ratio_hugging_face_encoder")
    for K in (4, 1):
        equal, largest = (inference["gqa", K, batch] for batch in ("equal", "largest"))
        assert equal.keys() >= {"prefill_seconds", "token_seconds", "kv_cache_bytes"} | ratios
        assert equal.keys() >= {"step_bandwidth_share", "floor_share", "attention_bandwidth_share"}
        assert largest.keys() == equal.keys() - {r for r in equal if "_ratio_" in r} | {
            f"{part}_ratio_mha" for part in ("prefill", "token", "sample")
        }
    training = rows(measured, "training")
    metrics = {"step_seconds", "target_tokens_per_second", "mfu"}
    assert training["hugging_face", 4, "equal"].keys() == metrics
    assert training["gqa", 4, "equal"].keys() == metrics | {"step_ratio_hugging_face"}


def test_the_floor_is_caches_and_the_slower_ceiling_of_weights(measured, config):
    for (system, K, _), row in rows(measured, "inference").items():
        if system != "gqa":
            continue
        size = row["token_seconds"]["variant"]["batch_size"]
        step = kv_cache.step(benchmark._nets(config)[K], size, LENGTH, DECODED)
        cache = step.self_cache + step.cross_cache
        weights = max(step.weights / BANDWIDTH, step.flops / RATE)
        floor = cache / BANDWIDTH + weights
        assert row["floor_seconds"]["value"] == pytest.approx(floor)
        token = row["token_seconds"]["value"]
        assert row["floor_share"]["value"] == pytest.approx(floor / token)
        moved = cache + step.weights
        assert row["step_bandwidth_share"]["value"] == pytest.approx(moved / token / BANDWIDTH)
        attention = row["attention_seconds"]["value"] * row["attention_bandwidth"]["value"]
        assert attention == pytest.approx(step.cross_cache)


def test_weights_can_be_bound_by_their_products():
    step = kv_cache.Step(weights=1000, cross_cache=0, self_cache=0.0, flops=1e6)
    times = {"token_seconds": np.array([2.0])}
    machine = {"read_bandwidth": np.array([1000.0]), "matmul_rate": np.array([1e5])}
    parts = {"attention": np.array([1.0])}
    bound_by_products = timings.traffic(step, times, parts, machine)
    assert bound_by_products["floor_seconds"] == 10
    machine["matmul_rate"] = np.array([1e7])
    assert timings.traffic(step, times, parts, machine)["floor_seconds"] == 1


def test_ratios_pair_numbers_of_a_turn():
    """A machine that slows every system down alike between turns changes no ratio."""
    ours, theirs = np.array([1.0, 5.0, 9.0]), np.array([2.0, 10.0, 18.0])
    ratios = timings.ratios({"token_seconds": ours}, {"token_seconds": theirs}, "peer")
    assert ratios["token_ratio_peer"].tolist() == [0.5, 0.5, 0.5]


def test_a_peers_first_token_is_prefill(monkeypatch):
    """The time of the other tokens is divided by T - 1."""
    monkeypatch.setattr(benchmark.timing, "timed", lambda run: (run(), None))
    peer = peers.Peer(lambda length: 10.0 + length, lambda: 4.0)
    parts = benchmark._peer_turn(peer, 5)
    assert parts == {"prefill": 11.0, "decode": 4.0, "encoder": 4.0}
    times = benchmark._times({benchmark.Entry(peers.HUGGING_FACE, 4, 2): parts}, 5)
    assert times[benchmark.Entry(peers.HUGGING_FACE, 4, 2)]["token_seconds"] == 1.0


def test_the_largest_batch_fills_the_memory(config):
    for K, largest in ((4, 3), (1, 4)):  # one KV head would allow more than the limit of 4
        net = benchmark._nets(config)[K]
        assert benchmark._batch_sizes(config, net, LENGTH) == {"equal": BATCH, "largest": largest}
    weights = kv_cache.nbytes(kv_cache.weight_shapes(net := benchmark._nets(config)[4]))
    sequence = kv_cache.kv_cache_bytes(net.config, 1, LENGTH, DECODED, net.cache_dtype)
    room = config.benchmark.memory_gib * 2**30 - weights
    assert 3 * sequence <= room < 4 * sequence


def test_every_divisor_is_timed_by_default():
    config = sweep.get_config()
    assert list(benchmark._nets(config)) == [16, 8, 4, 2, 1]
    assert all(isinstance(net, Inference) for net in benchmark._nets(config).values())


def test_the_default_is_the_shape_that_is_published():
    model = sweep.get_config().model
    expected = {"d_model": 512, "d_ff": 1024, "num_heads": 16, "head_dim": 64}
    expected |= {"num_encoder_layers": 8, "num_decoder_layers": 8, "vocab_size": 32128}
    assert expected.items() <= model.to_dict().items()
    assert model.dtype == "float32"


def test_the_report_shows_all_systems(measured, config, capsys):
    workdir, records, _ = measured
    text = (workdir / "speed.md").read_text()
    for label in ("ours, 4 KV heads", "ours, 1 KV heads", "Hugging Face, 4", "CTranslate2, 4"):
        assert f"| {label}" in text
    assert "the largest batch that fits" in text
    assert "Training nano" in text
    assert records[0]["commit"] in text
    assert (workdir / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (workdir / "speed.svg").read_bytes()
    benchmark.run(config, workdir, "report", Options())  # without measuring again
    assert (workdir / "speed.md").read_text() == text
    assert "ours, 1 KV heads" in capsys.readouterr().out


def test_only_the_last_measurement_of_a_part_is_shown(measured, config, tmp_path):
    _, records, _ = measured
    earlier = {"time": "2020-01-01T00:00:00+00:00"}
    older = [r | earlier | {"variant": r["variant"] | {"inputs_length": 999}} for r in records]
    results.append(tmp_path / "results.jsonl", older + records)
    keys = benchmark.stage_keys(config)
    again = speed_report.run(tmp_path / "results.jsonl", tmp_path, "speed", keys)
    assert "999 input" not in again
    assert f"{LENGTH} input" in again
    with pytest.raises(UserError, match="no timings of speed-large with these"):
        speed_report.run(tmp_path / "results.jsonl", tmp_path, "speed-large", {"training": "x"})


def test_the_main_jobs_report_leaves_out_speed_records(measured, tmp_path):
    with pytest.raises(UserError, match="no results of this command yet"):
        report.run(measured[0] / "results.jsonl", tmp_path, {measured[1][0]["stage_key"]})


def test_a_report_has_no_timings_of_other_settings(measured, config, tmp_path):
    """Of the same name: A, then B with a longer output, then the report of A."""
    _, records, _ = measured
    other = config.copy_and_resolve_references()
    other.benchmark.targets_length += 1
    keys, other_keys = benchmark.stage_keys(config), benchmark.stage_keys(other)
    assert {r["stage_key"] for r in records} == set(keys.values())
    assert keys["inference"] != other_keys["inference"]
    assert keys["training"] == other_keys["training"]
    of_other = [
        r | {"stage_key": other_keys["inference"], "value": 12345.0, "time": "2099"}
        for r in records
        if r["stage"] == "inference"
    ]
    results.append(tmp_path / "results.jsonl", records + of_other)
    assert "12345" not in speed_report.run(tmp_path / "results.jsonl", tmp_path, "speed", keys)

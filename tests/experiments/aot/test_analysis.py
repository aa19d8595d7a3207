"""Ahead-of-time analysis: ceilings, times, and what compiled programs may not do."""

import gzip
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from configs.sweeps import aot as sweep
from experiments.aot import analysis, compilation, roofline
from experiments.aot import report as aot_report
from experiments.aot.compilation import Compiled
from experiments.aot.roofline import Time, Work
from gqa.aot import chips
from gqa.runtime.errors import UserError
from gqa.runtime.mesh import Layout
from tests.aot.test_hlo import TEXT

ROOT = Path(__file__).parent.parent.parent.parent
COMPILES = """
import json, sys
from pathlib import Path
from experiments.aot import compilation
from gqa.aot import chips, costs, hlo
from gqa import kv_cache
from gqa.runtime import sharding
from gqa.inference.step import Inference
from gqa.model.config import Config
from gqa.runtime.mesh import Layout, resolve_layout

B, S, T, L = 16, 512, 256, 2
target = chips.find(sys.argv[2])
compilation.start([target])
compiler = compilation.Compiler(target, Layout(model=target.chips), Path(sys.argv[1]))
n, found = target.chips, {}

def largest_gather(program):
    sizes = (t.nbytes for t in costs.transfers(program) if t.kind == "all-gather")
    return max(sizes, default=0)

for K in (2, 8):
    config = Config(4096, 1024, 2048, 16, 64, L, L, 16, K, K, dtype="bfloat16")
    layout = resolve_layout(config, compiler.layout, compiler.mesh, B, S, T)
    net = Inference(config, backend=target.backend, layout=layout)
"""
STEP = """
    step = compiler.step(net, B, S, T)
    program = hlo.parse(step.text)
    found[K] = {
        "layout": layout.kv_heads,
        "reads": costs.reads(program, ("cache[", "memory.kv[")),
        "moves": len(costs.moves(program, B * K * 64 * T * 2 // n)),
        "gathered": largest_gather(program),
        "weight": 1024 * 16 * 64 * 2 // n,
        "arguments": step.arguments,
        "caches": 2 * L * B * K * 64 * (S + T) * 2 // n,
        "aliased": step.aliased,
        "own_caches": 2 * L * B * K * 64 * T * 2 // n,
        "weights": kv_cache.nbytes(kv_cache.weight_shapes(net)) // n,
        "temporary": step.temporary,
    }
print(json.dumps(found))
"""
PREFILL = """
    prefill = hlo.parse(compiler.prefill(net, B, S).text)
    encoded = B * S * 1024 * 2
    found[K] = largest_gather(prefill) / encoded
print(json.dumps(found))
"""


def test_every_slice_has_a_chip_and_its_size():
    known = chips.targets()
    assert known["v4-16"].chips == known["v6e-8"].chips == 8
    assert known["v4-8"].links == 2  # 2x2x1 has no third axis
    assert known["v4-128"].links == 6
    assert known["h100-8"].links == 1  # a switch
    assert {target.kind for target in known.values()} == chips.CHIPS.keys()
    for target in known.values():
        assert target.chip.source


def test_an_unknown_slice_is_refused():
    with pytest.raises(UserError, match=r"^target='v4-9'; use one of .*v4-16"):
        chips.find("v4-9")


def test_times_are_work_over_ceilings():
    target = chips.find("v4-16")
    time = roofline.time(Work(1200e9, 137.5e12, 75e9), target, 0.5)
    assert time == Time(memory=2.0, compute=1.0, network=1.0)
    assert (time.seconds, time.bound) == (3.0, "memory")


def test_a_sample_is_its_share_of_every_chip():
    # 8 chips: prefill of 4 rows takes 1 s, 10 steps of 16 rows 0.2 s each.
    assert roofline.sample_seconds(1.0, 4, 0.2, 10, 16, 8) == pytest.approx(8 * (0.25 + 0.125))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("target", "v9-1", "aot.target='v9-1'; use one of"),
        ("training_targets", ("v4-1",), "aot.training_targets='v4-1'; use one of"),
        ("kv_heads", (3,), "aot.kv_heads=3"),
        ("efficiency", 1.5, "aot.efficiency=1.5"),
        ("largest_batch_size", 0, "aot.largest_batch_size=0"),
    ],
)
def test_mistakes_are_told_before_compiling(key, value, message):
    config = sweep.get_config()
    with config.unlocked():
        config.aot[key] = value
    with pytest.raises(UserError, match=message):
        analysis.check(config)


def test_without_the_compiler_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -r requirements-aot.txt"):
        compilation.start([chips.find("v4-8")])
    with pytest.raises(UserError, match=r"for h100-8; pip install .jax\[cuda12\]=="):
        compilation.start([chips.find("h100-8")])


def test_a_report_of_nothing_is_refused(tmp_path):
    (tmp_path / "results.jsonl").write_text("")
    with pytest.raises(UserError, match="nothing compiled of aot-xxl"):
        aot_report.run(tmp_path / "results.jsonl", tmp_path, "aot-xxl", "key")


class Pretended(NamedTuple):
    """A compiler whose programs take a network's share of 1.45 GiB a row, and all do the same."""

    target: chips.Target
    layout: Layout
    folder: Path
    mesh = SimpleNamespace(size=8)

    def step(self, net, batch_size, S, T):
        share = net.config.num_kv_heads_self_attention / net.config.num_heads
        rows = batch_size // self.target.chips
        return Compiled(arguments=int(1.45 * 2**30 * share * rows), seconds=1.0, text=TEXT)

    def prefill(self, net, batch_size, S):
        return Compiled(arguments=1, text=TEXT)

    def train(self, config, *shape):
        fits = self.target.chips > 64
        return Compiled(1, text=TEXT) if fits else Compiled(failure="Used 40G of 30G hbm")


@pytest.mark.parametrize("name", ["v4-16", "h100-8"])
def test_the_largest_batches_are_found_and_reported(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(compilation, "start", lambda targets: None)
    monkeypatch.setattr(analysis, "Compiler", Pretended)
    config = sweep.get_config().unlock()
    config.aot.update({"target": name, "kv_heads": (8, 32, 64)})
    analysis.run(config, tmp_path, None)
    said = capsys.readouterr().out
    report = (tmp_path / "report.md").read_text()
    assert said.count("64 KV heads, batch 168: 30.4 GiB") == (name == "v4-16")  # 21 rows of 32 fit
    assert "32 KV heads, batch 256: 23.2 GiB" in said
    assert "v4-128: training, batch 2048: Used 40G of 30G hbm" in said
    assert "Training xxl on 128 chips of TPU v4 (v4-256)" in report
    assert (" 2.53 s " in report) == (name == "v4-16")  # the paper's, of 8 TPU v4
    assert ("MHA / GQA-8" in report) == ("not explain the paper's jump" in report)
    assert ("MHA / GQA-8" in report) == (name == "v4-16")
    assert "| 3.00 " in report  # reads of a cache byte
    assert (tmp_path / "sample_seconds.png").stat().st_size > 10_000
    analysis.run(config, tmp_path, "report")
    assert (tmp_path / "report.md").read_text() == report


def compiled(body, folder, name):
    """What a script with `body` prints of programs for the slice `name`.

    With jax[cuda12] in the environment instead of libtpu it compiles for H100.
    """
    package, install = compilation.COMPILERS[chips.find(name).platform]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not here: pip install {install}")
    command = [sys.executable, "-c", COMPILES + body, str(folder), name]
    # The compiler may be beside the environment instead of in it.
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    }
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["v4-16", "v5e-8", "v5p-16", "v6e-8", "h100-1", "h100-8"])
def test_a_step_reads_a_cache_once_and_gathers_no_weight(tmp_path, name):
    """For each kind of chip, with KV heads on each chip and, on eight, with rows on each."""
    found = compiled(STEP, tmp_path, name)
    assert found["8"]["layout"] == "replicate"
    assert found["2"]["layout"] == ("replicate" if name == "h100-1" else "batch")
    for n in found.values():
        assert n["reads"] == 1
        assert n["moves"] == 0
        assert n["gathered"] < n["weight"]
        assert n["aliased"] == n["own_caches"]  # updated in place
        assert 0 < n["arguments"] - n["caches"] < 1.1 * n["weights"] + 2**20
        assert n["temporary"] < n["caches"] + 2**20


@pytest.mark.parametrize("name", ["v4-16", "h100-8"])
def test_prefill_does_not_gather_what_was_encoded(tmp_path, name):
    assert max(compiled(PREFILL, tmp_path, name).values()) < 1 / 8


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("numbers", os.mkfifo),
        ("text", os.mkfifo),
        ("numbers", lambda path: path.write_text("[" * 10**5)),
        ("numbers", lambda path: path.write_text('{"arguments": "x"}')),
        ("numbers", lambda path: path.write_text('{"other": 1}')),
        ("numbers", lambda path: path.write_text('{"text": "x"}')),
        ("text", lambda path: path.write_bytes(b"no gzip")),
        ("text", lambda path: path.write_bytes(gzip.compress(b"\xff"))),
        ("text", lambda path: path.write_bytes(gzip.compress(bytes(2**20)) * 80)),
    ],
)
def test_a_kept_program_that_is_damaged_is_compiled_again(tmp_path, name, damage):
    files = {"numbers": tmp_path / "program.json", "text": tmp_path / "program.hlo.gz"}
    program = Compiled(arguments=3, seconds=0.5, text="HloModule")
    compilation.keep(program, **files)
    assert compilation.kept(**files) == program

    files[name].unlink()
    damage(files[name])
    assert compilation.kept(**files) is None

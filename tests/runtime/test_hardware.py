from types import SimpleNamespace

import jax
import pytest

from gqa.runtime import hardware
from gqa.runtime.errors import UserError


@pytest.fixture
def on(monkeypatch):
    """Makes the run one on `count` devices of a kind."""

    def pretend(kind, count=1, platform="gpu"):
        device = SimpleNamespace(device_kind=kind, platform=platform)
        monkeypatch.setattr(jax, "devices", lambda: [device] * count)
        monkeypatch.setattr(jax, "device_count", lambda: count)

    hardware.peak_flops.cache_clear()
    yield pretend
    hardware.peak_flops.cache_clear()


@pytest.mark.parametrize(
    ("kind", "bfloat16", "float32"),
    [
        ("TPU v4", 275e12, 275e12),
        ("TPU v4 lite", 138e12, 138e12),
        ("TPU v5 lite", 197e12, 197e12),
        ("TPU v5", 459e12, 459e12),
        ("TPU v6 lite", 918e12, 918e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 156e12),
        ("NVIDIA A100 80GB PCIe", 312e12, 156e12),
        ("NVIDIA A10", 125e12, 62.5e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12, 494.5e12),
        ("NVIDIA H100 PCIe", 756.5e12, 378e12),
        ("NVIDIA H200", 989.5e12, 494.5e12),
        ("NVIDIA L4", 121e12, 60e12),
        ("NVIDIA L40S", 362e12, 183e12),
    ],
)
def test_known_devices(on, kind, bfloat16, float32):
    on(kind)
    assert hardware.peak_flops("bfloat16") == pytest.approx(bfloat16)
    assert hardware.peak_flops("float32") == pytest.approx(float32)


def test_all_devices_add_up(on):
    on("TPU v4", 32)
    assert hardware.peak_flops("bfloat16") == pytest.approx(32 * 275e12)


@pytest.mark.parametrize("kind", ["TPU v99", "NVIDIA L40", "NVIDIA A100-SXM4-40GB MIG 1g.5gb"])
def test_an_unknown_device_has_no_peak_and_that_is_said_once(on, kind, capsys):
    on(kind)
    assert [hardware.peak_flops("bfloat16") for _ in range(2)] == [None, None]
    assert capsys.readouterr().out.count(kind) == 1


def test_a_cpu_is_measured_once_whatever_the_devices(on, monkeypatch):
    rates = iter([5e9, 7e9])
    monkeypatch.setattr(hardware, "matmul_rate", lambda dtype: next(rates))
    on("cpu", 8, "cpu")
    assert [hardware.peak_flops("float32") for _ in range(2)] == [5e9, 5e9]


def test_the_best_of_the_runs_after_the_first_counts(monkeypatch):
    seconds = iter([0.0, 0.5, 1.0, 1.1, 2.0, 2.8])
    clock = SimpleNamespace(perf_counter=lambda: next(seconds))
    monkeypatch.setattr(hardware, "time", clock)
    runs = []
    assert hardware._best_seconds(lambda: runs.append(1)) == pytest.approx(0.1)
    assert len(runs) == 4


def test_rates_are_work_over_seconds(monkeypatch):
    monkeypatch.setattr(hardware, "_best_seconds", lambda run: run().size * 0.0 + 2.0)
    assert hardware.matmul_rate("float32") == 1536**3
    assert hardware.read_bandwidth() == 2**28


def test_processes_are_taken_to_have_a_machine_each(on, monkeypatch):
    monkeypatch.setattr(hardware, "matmul_rate", lambda dtype: 5e9)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    on("cpu", 8, "cpu")
    assert hardware.peak_flops("float32") == 15e9


@pytest.mark.parametrize(("backend", "refused"), [("cpu", True), ("gpu", False)])
def test_memory_is_the_machines_on_cpus_alone(monkeypatch, backend, refused):
    memory = SimpleNamespace(total=3 * 2**30)
    monkeypatch.setattr(hardware.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    hardware.check_memory(3 * 2**30, "it")
    if not refused:
        hardware.check_memory(4 * 2**30, "it")
        return
    with pytest.raises(UserError, match=r"it takes 4\.0 GiB, this machine has 3\.0 GiB"):
        hardware.check_memory(4 * 2**30, "it")

"""Signals to real processes: they end in order, soon, with 128 + the signal, and lose nothing."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import toy

ROOT = Path(__file__).parent.parent.parent
MAIN = """
import hashlib, sys, time
from pathlib import Path
from gqa.runtime import signals
def busy(seconds):  # in C, where no Python runs, whatever the signals
    hashlib.pbkdf2_hmac("sha256", b"", b"", int(seconds * RATE))
begin = time.monotonic()
hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000)
RATE = 100_000 / (time.monotonic() - begin)
def main():
    {body}
signals.install()
try:
    main()
except signals.Interrupted as interrupted:
    print(interrupted, flush=True)
    sys.exit(128 + interrupted.signum)
"""
COMPILE = """
    import jax, jax.numpy as jnp
    signals.PATIENCE = 1.0
    def deep(x):
        for i in range(4000):
            x = jnp.sin(x) * i + x[::-1]
        return x
    lowered = jax.jit(deep).lower(jnp.ones(64))
    with signals.deferred():
        print("ready", flush=True)
        begin = time.monotonic()
        lowered.compile()
        print("compiled in", time.monotonic() - begin)
"""
STEPS = """
    from tests.support import toy
    toy.fit(Path(sys.argv[1]), 40, 4, alive=lambda _: (print("ready"), time.sleep(0.02)))
"""
SAVE = """
    signals.PATIENCE = signals.GRACE = 0.5
    with signals.deferred():
        print("ready", flush=True)
        with signals.saving():
            busy(2)
            print("saved", flush=True)
"""


def run(body, *arguments, signals=(signal.SIGTERM,), apart=0.5, prefix=()):
    """Send signals once the program says "ready": (status, seconds it took to end, output)."""
    script = MAIN.format(body=body.strip())
    with subprocess.Popen(
        [*prefix, sys.executable, "-u", "-c", script, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stdout:
            if line == "ready\n":
                break
        begin = time.monotonic()
        for number in signals:
            time.sleep(apart)
            process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    return process.returncode, time.monotonic() - begin, output


def test_a_step_is_finished_and_saved(tmp_path):
    status, seconds, output = run(STEPS, tmp_path / "parts")
    assert status == 128 + signal.SIGTERM
    assert seconds < 15
    saved = max((tmp_path / "parts" / "checkpoints").iterdir(), key=lambda p: int(p.name))
    assert output.endswith(f"interrupted by SIGTERM; the same command goes on from {saved}\n")
    assert 1 < int(saved.name) < 40
    toy.fit(tmp_path / "parts", 40, 4)
    toy.fit(tmp_path / "whole", 40, 4)
    toy.assert_same(toy.outcome(tmp_path / "parts"), toy.outcome(tmp_path / "whole"))


def test_a_compilation_is_given_up(tmp_path):
    status, seconds, output = run(COMPILE)
    assert (status, output) == (128 + signal.SIGTERM, "")
    assert seconds < 10


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_elsewhere_the_signal_is_raised_at_once(number):
    body = "print('ready', flush=True); time.sleep(60)"
    # The tests themselves may run under nohup, whose children ignore SIGHUP.
    prefix = ["env", f"--default-signal={number.name}"]
    status, seconds, output = run(body, signals=[number], prefix=prefix)
    assert (status, seconds < 10) == (128 + number, True)
    assert output == f"interrupted by {number.name}; the same command goes on from where it was\n"


def test_a_hangup_that_nohup_ignores_stays_ignored():
    body = "print('ready', flush=True); time.sleep(1); print('went on')"
    status, _, output = run(body, signals=[signal.SIGHUP], prefix=["nohup"])
    assert (status, output) == (0, "went on\n")


def test_a_second_signal_ends_the_process_at_once():
    body = "print('ready', flush=True); busy(30)"
    status, seconds, output = run(body, signals=[signal.SIGTERM, signal.SIGINT])
    assert (status, output) == (128 + signal.SIGINT, "")
    assert seconds < 10


def test_an_echo_of_the_first_signal_is_not_a_second():
    """timeout(1) sends its signal to the process and to its group."""
    body = "print('ready', flush=True); busy(2); time.sleep(60)"
    status, _, output = run(body, signals=[signal.SIGTERM] * 2, apart=0.05)
    assert status == 128 + signal.SIGTERM
    assert output.startswith("interrupted by SIGTERM")


def test_the_end_waits_for_a_checkpoint_that_is_being_saved():
    status, _, output = run(SAVE)
    assert status == 128 + signal.SIGTERM
    assert output.startswith("saved\ninterrupted by SIGTERM")

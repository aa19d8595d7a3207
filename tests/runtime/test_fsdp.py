"""A network that is spread over four real processes, and what they save, is that of one device.

GQA_LARGE_TESTS=1 also kills one of the four, and goes on as two.
"""

import os
import shutil
import signal

import jax
import numpy as np
import pytest

from gqa.runtime.mesh import Layout
from tests.support import several_processes

# Each process has two devices, "model" joins two processes; parameters and moments are split over
# all eight devices.
FIT = """
    from gqa.runtime.mesh import Layout
    from tests.support import several_processes as several
    def alive(step):
        print(step, file=sys.stderr, flush=True)
        time.sleep({pause})
    layout = Layout(model={model}, fsdp=True)
    several.fit(folder, 6, layout, alive)
    several.generate(folder, layout)
"""
SPREAD = {"count": 4, "devices": 2}
large = pytest.mark.skipif(not os.environ.get("GQA_LARGE_TESTS"), reason="takes three minutes")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp") / "whole"
    several_processes.run(FIT.format(pause=0, model=4), folder, **SPREAD)
    return folder


def close(found, expected):
    """To float32 rounding, three steps and more of which Adafactor has scaled."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected)


def test_four_processes_are_one_device(whole, tmp_path):
    one = tmp_path / "one"
    several_processes.fit(one, 6, Layout())
    found, expected = several_processes.outcome(whole), several_processes.outcome(one)
    assert sorted(found) == [2, 4, 6]
    close(found, expected)
    files = [p for p in (whole / "checkpoints" / "6" / "params").rglob("*") if p.is_file()]
    assert len([p for p in files if "ocdbt.process_" in str(p)]) >= 4  # each has written its part
    several_processes.generate(one, Layout())
    with np.load(whole / "texts.npz") as texts, np.load(one / "texts.npz") as others:
        for name in others:
            assert len({row.tobytes() for row in texts[name]}) > 5
            np.testing.assert_array_equal(texts[name], others[name])


@large
def test_one_of_four_is_killed_and_they_go_on_bit_for_bit(whole, tmp_path):
    folder = tmp_path / "parts"
    processes = several_processes.Processes(FIT.format(pause=0.3, model=4), folder, **SPREAD)
    processes.wait_for(2, "3")
    processes.processes[2].kill()
    statuses, _ = processes.end()
    assert statuses[2] == -signal.SIGKILL
    assert 0 not in statuses
    saved = {path.name for path in (folder / "checkpoints").iterdir()}
    assert "6" not in saved
    several_processes.run(FIT.format(pause=0, model=4), folder, **SPREAD)
    jax.tree.map(
        np.testing.assert_array_equal,
        several_processes.outcome(folder),
        several_processes.outcome(whole),
    )


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=large)])
def test_they_go_on_as_fewer_on_another_mesh(whole, tmp_path, count):
    """From what four processes saved at step 4, bit for bit that, on to what they had at 6."""
    folder = tmp_path / "fewer"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints" / "6")
    if count == 1:
        several_processes.fit(folder, 6, Layout())
    else:
        several_processes.run(FIT.format(pause=0, model=1), folder, count=count)
    close(several_processes.outcome(folder), several_processes.outcome(whole))

"""The seal of a checkpoint's folder: every file is in it, and every change is found."""

import json
import os

import pytest

from gqa.checkpoints import checksums
from gqa.runtime.errors import DamagedCheckpoint


@pytest.fixture
def step(tmp_path):
    """A folder that is sealed, with files at several depths, one of them with the seal's name."""
    step = tmp_path / "3"
    (step / "params" / "deep").mkdir(parents=True)
    (step / "opt_state").mkdir()
    for name in ("top", "params/a", "params/deep/b", "params/checksums.json", "opt_state/c"):
        (step / name).write_text(name)
    checksums.write(step, {"loss": 1.5})
    return step


def test_every_file_but_the_seal_itself_is_sealed(step):
    sealed = json.loads((step / "checksums.json").read_text())["files"]
    names = {"top", "params/a", "params/deep/b", "params/checksums.json", "opt_state/c"}
    assert sealed.keys() == names
    assert {name: size for name, (size, _) in sealed.items()} == {n: len(n) for n in names}
    checksums.verify(step, ["params", "opt_state"])


@pytest.mark.parametrize("name", ["top", "params/a", "params/deep/b", "params/checksums.json"])
def test_contents_of_the_same_size_are_told_apart(step, name):
    (step / name).write_text(name.upper())
    with pytest.raises(DamagedCheckpoint, match=f"the contents of {name} have changed") as caught:
        checksums.verify(step, ["params"])
    assert caught.value.step == step


def test_contents_are_compared_only_of_the_items_asked_for_and_sizes_of_all(step):
    (step / "opt_state" / "c").write_text("OPT_STATE/C")
    checksums.verify(step, ["params"])
    with pytest.raises(DamagedCheckpoint, match="opt_state/c"):
        checksums.verify(step, ["opt_state"])
    (step / "opt_state" / "c").write_text("longer than before")
    with pytest.raises(DamagedCheckpoint, match="opt_state/c has 18 bytes instead of 11"):
        checksums.verify(step, ["params"])


def test_files_that_are_missing_or_new_are_named(step):
    (step / "params" / "deep" / "checksums.json").write_text("x")
    with pytest.raises(DamagedCheckpoint, match=r"params/deep/checksums\.json was added"):
        checksums.verify(step, [])
    (step / "params" / "deep" / "checksums.json").unlink()
    (step / "params" / "checksums.json").unlink()
    with pytest.raises(DamagedCheckpoint, match=r"params/checksums\.json is missing"):
        checksums.verify(step, [])


@pytest.mark.parametrize("field", ["files", "metrics", "sha256"])
def test_a_seal_that_was_edited_is_damaged(step, field):
    path = step / "checksums.json"
    content = json.loads(path.read_text())
    content[field] = {"files": {}, "metrics": {"loss": 0.5}, "sha256": "0" * 64}[field]
    path.write_text(json.dumps(content))
    with pytest.raises(DamagedCheckpoint, match=r"the contents of checksums\.json have changed"):
        checksums.metrics(step)


def test_a_seal_behind_a_link_or_none_is_missing(step, tmp_path):
    path = step / "checksums.json"
    assert checksums.is_sealed(step)
    os.rename(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedCheckpoint, match=r"checksums\.json is missing"):
        checksums.metrics(step)
    path.unlink()
    assert not checksums.is_sealed(step)


def test_metrics_are_kept_and_can_be_added_later(step):
    assert checksums.metrics(step) == {"loss": 1.5}
    checksums.write(step, None)
    assert checksums.metrics(step) is None
    checksums.amend(step, {"loss": 0.25})
    assert checksums.metrics(step) == {"loss": 0.25}
    checksums.verify(step, ["params", "opt_state"])
    assert [path.name for path in step.parent.iterdir()] == ["3"]  # no leftover

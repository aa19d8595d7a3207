"""What a stage leaves is read back whole, and half of it is refused."""

import pytest

from experiments.stages.folder import Outcome, StageFolder, record
from gqa.runtime.errors import UserError


def test_an_outcome_is_read_back(tmp_path):
    folder = StageFolder(tmp_path)
    assert folder.read_outcome() is None
    outcome = Outcome([record("steps", 3, "steps", n=2)], "3", {"commit": "abc"}, 1.5)
    folder.write_outcome(outcome)
    assert folder.read_outcome() == outcome
    assert outcome.records == [{"metric": "steps", "value": 3, "unit": "steps", "n": 2}]
    folder.discard_outcome()
    assert folder.read_outcome() is None


@pytest.mark.parametrize("content", ["{}", '{"records": []}', "[]", "{"])
def test_half_an_outcome_is_refused(tmp_path, content):
    (tmp_path / "done.json").write_text(content)
    with pytest.raises(UserError, match=r"done\.json is damaged; remove it"):
        StageFolder(tmp_path).read_outcome()


def test_a_stage_with_a_damaged_outcome_is_not_finished(tmp_path):
    """Another stage does not begin with its checkpoints."""
    folders = [StageFolder.of(tmp_path, "pretrain", key) for key in "abc"]
    for folder in folders:
        folder.path.mkdir(parents=True)
    for folder in folders[:2]:
        folder.write_outcome(Outcome([record("steps", 3, "steps")], "3"))
    (folders[1].path / "done.json").write_text('{"records": [')
    assert folders[2].finished_siblings("pretrain") == [folders[0]]

"""What a stage leaves is read back whole, and half of it is refused."""

import pytest

from experiments.stages.folder import Outcome, StageFolder, record
from gqa.runtime.errors import UserError


def test_an_outcome_is_read_back(tmp_path):
    folder = StageFolder(tmp_path)
    assert folder.read_outcome() is None
    assert not folder.is_finished
    outcome = Outcome([record("steps", 3, "steps", n=2)], "3", {"commit": "abc"}, 1.5)
    folder.write_outcome(outcome)
    assert folder.is_finished
    assert folder.read_outcome() == outcome
    assert outcome.records == [{"metric": "steps", "value": 3, "unit": "steps", "n": 2}]
    folder.discard_outcome()
    assert folder.read_outcome() is None


@pytest.mark.parametrize("content", ["{}", '{"records": []}', "[]", "{"])
def test_half_an_outcome_is_refused(tmp_path, content):
    (tmp_path / "done.json").write_text(content)
    with pytest.raises(UserError, match=r"done\.json is damaged; remove it"):
        StageFolder(tmp_path).read_outcome()

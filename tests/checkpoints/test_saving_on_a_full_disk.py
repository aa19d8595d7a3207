"""Training on a full disk: one clear error, and the same call goes on once there is space."""

import pytest

from gqa.runtime.errors import UserError, is_disk_full
from tests.support import small_disk, toy

SIZE = 2 * 2**20


@pytest.fixture
def disk(tmp_path):
    with small_disk.mounted(tmp_path / "disk", "2m") as folder:
        yield folder


# Orbax drops coroutines of a save that failed, in loops that are closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
# With so many KiB left: nothing is written, not the first checkpoint, not a later one.
@pytest.mark.parametrize(("kib", "left"), [(8, 0), (48, 0), (130, 1), (180, 2)])
def test_a_full_disk_is_told_and_costs_nothing(disk, tmp_path, kib, left):
    filler = disk / "filler"
    filler.write_bytes(bytes(SIZE - kib * 1024))
    with pytest.raises(UserError) as caught:
        toy.fit(disk / "run", 20, 4)
    message = str(caught.value)
    assert message.startswith("no space left on device while ")
    assert "free space and run the same command again" in message
    assert "\n" not in message
    assert is_disk_full(caught.value)
    filler.unlink()
    if left:  # earlier checkpoints are whole, every one
        steps = toy.outcome(disk / "run")["checkpoints"]
        assert list(steps) == [4 * (i + 1) for i in range(left)]
        assert f"while saving checkpoint {disk}/run/checkpoints/{4 * (left + 1)};" in message
    toy.fit(disk / "run", 20, 4)
    toy.fit(tmp_path / "whole", 20, 4)
    toy.assert_same(toy.outcome(disk / "run"), toy.outcome(tmp_path / "whole"))

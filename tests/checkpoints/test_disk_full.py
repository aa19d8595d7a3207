"""A full disk, a real one: one clear error, and the same command goes on once there is space."""

import subprocess

import pytest

from gqa.runtime.errors import UserError, is_disk_full
from tests.support import toy

SIZE = 2 * 2**20


@pytest.fixture
def disk(tmp_path):
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"mounting a file system is refused here: {error}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


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


def test_a_full_disk_is_known_from_what_led_to_an_error():
    def chain(first):
        try:
            try:
                raise first
            except Exception as error:
                raise RuntimeError("the save failed") from error
        except RuntimeError as error:
            return error

    for error in (
        OSError(28, "No space left on device"),
        OSError(122, "Disk quota exceeded"),
        ValueError("RESOURCE_EXHAUSTED: Error writing: [OS error 28: No space left on device]"),
    ):
        assert is_disk_full(error)
        assert is_disk_full(chain(error))
    assert not is_disk_full(chain(OSError(2, "No such file or directory")))
    assert not is_disk_full(None)

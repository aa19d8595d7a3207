"""A real disk of some kilobytes, to be filled."""

import contextlib
import subprocess

import pytest


@contextlib.contextmanager
def mounted(folder, size):
    """Mount a file system of `size`, such as "2m", on a new folder; only root can."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"mounting a file system is refused here: {error}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder):
    """Take all space of a disk but less than a page; return the file that takes it."""
    path = folder / "ballast"
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return path


def assert_full(error, path):
    """Check that a caught OSError is of a full disk and names `path`."""
    assert error.value.errno == 28
    assert str(path) in str(error.value)

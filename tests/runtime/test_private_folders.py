"""Code is loaded only from folders that nobody else can write to."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from gqa.runtime import compilation_cache
from gqa.runtime.errors import UserError
from gqa.runtime.private_folders import make_private

ROOT = Path(__file__).parent.parent.parent
SCRIPT = """
import jax
from gqa.runtime import compilation_cache
compilation_cache.enable()
print(jax.config.jax_compilation_cache_dir)
"""


def test_a_new_folder_is_for_its_owner_alone(tmp_path):
    old = os.umask(0)
    try:
        make_private(tmp_path / "a" / "b")
    finally:
        os.umask(old)
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "a").stat().st_mode & 0o022 == 0
    make_private(tmp_path / "a" / "b")


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o722, 0o777, 0o1777])
def test_a_folder_that_others_write_to_is_refused(tmp_path, mode):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(mode)
    with pytest.raises(UserError, match=r"shared: others can write to it.*chmod go-w"):
        make_private(tmp_path / "shared")
    (tmp_path / "link").symlink_to(tmp_path / "shared")
    with pytest.raises(UserError, match="others can write to it"):
        make_private(tmp_path / "link")


def test_a_folder_of_another_user_is_refused(tmp_path, monkeypatch):
    (tmp_path / "theirs").mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: (tmp_path / "theirs").stat().st_uid + 1)
    with pytest.raises(UserError, match="theirs: belongs to another user"):
        make_private(tmp_path / "theirs")


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: not a folder; move it away"):
        make_private(tmp_path / "file")


def run(**environment):
    names = ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env=kept | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_compiled_programs_are_kept_in_the_home_of_the_user(tmp_path):
    folder = tmp_path / ".cache" / "gqa" / "compiled"
    assert run(HOME=str(tmp_path)) == [str(folder)]
    assert folder.stat().st_mode & 0o777 == 0o700


def test_the_folder_that_the_user_names_is_checked_too(tmp_path, monkeypatch):
    monkeypatch.setattr(jax.config, "update", lambda *_: pytest.fail("it is used"))
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    monkeypatch.setattr(type(jax.config), "jax_compilation_cache_dir", str(tmp_path / "shared"))
    with pytest.raises(UserError, match="others can write to it"):
        compilation_cache.enable()


def test_without_a_place_for_it_nothing_is_kept(tmp_path):
    (tmp_path / "file").touch()
    said, folder = run(XDG_CACHE_HOME=str(tmp_path / "file"))
    assert said.startswith("compiled programs are not kept: ")
    assert folder == "None"


@pytest.mark.parametrize(
    ("most", "kept"), [(25, "bcd"), (24, "cd"), (9, ""), (10, "d"), (99, "abcd")]
)
def test_compiled_programs_that_were_not_used_for_longest_are_deleted(
    tmp_path, monkeypatch, most, kept
):
    """In the user's own folder, not in one that was named and may serve other programs."""
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setattr(compilation_cache, "MAX_BYTES", most)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "gqa" / "compiled"
    make_private(folder)
    # Name, time of the last write, time of the last read, bytes.
    for name, written, read, size in (
        ("c", 1, 7, 5),
        ("a", 2, 2, 9),
        ("d", 8, 1, 10),
        ("b", 4, 3, 10),
    ):
        (folder / name).write_bytes(bytes(size))
        os.utime(folder / name, (read, written))

    monkeypatch.setattr(type(jax.config), "jax_compilation_cache_dir", str(folder))
    compilation_cache.enable()
    assert len(os.listdir(folder)) == 4
    monkeypatch.setattr(type(jax.config), "jax_compilation_cache_dir", None)
    compilation_cache.enable()
    assert sorted(os.listdir(folder)) == [*kept]

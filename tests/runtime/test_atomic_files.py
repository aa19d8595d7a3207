"""A file is seen whole or not at all, and no link or name of a stranger decides where it goes."""

import os
import stat

import pytest

from gqa.runtime import atomic_files


def test_the_old_file_stays_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "a.json"
    atomic_files.write(path, "old")
    with atomic_files.writing(path) as temporary:
        temporary.write_text("ne")
        assert path.read_text() == "old"
        assert temporary.parent == tmp_path
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_after_an_error_only_the_old_file_is_there(tmp_path, error):
    path = tmp_path / "a.json"
    atomic_files.write(path, b"old")

    def write():
        with atomic_files.writing(path) as temporary:
            temporary.write_text("ne")
            raise error

    with pytest.raises(type(error)):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    assert not isinstance(error, OSError) or error.filename == str(path)


def test_names_cannot_be_guessed_and_no_link_is_followed(tmp_path, monkeypatch):
    path, victim = tmp_path / "a.json", tmp_path / "victim"
    victim.write_text("precious")
    path.symlink_to(victim)
    names = set()
    for _ in range(3):
        with atomic_files.writing(path) as temporary:
            names.add(temporary.name)
            temporary.write_text("new")
    assert len(names) == 3
    assert (victim.read_text(), path.read_text(), path.is_symlink()) == ("precious", "new", False)

    # Even a name that was guessed is not written to.
    monkeypatch.setattr(atomic_files.secrets, "token_hex", lambda _: "0")
    (tmp_path / "a.json.0.tmp").symlink_to(victim)
    with pytest.raises(FileExistsError):
        atomic_files.write(path, "newer")
    assert (victim.read_text(), path.read_text()) == ("precious", "new")


def test_permissions_are_those_that_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        atomic_files.write(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127])
def test_a_name_may_be_as_long_as_the_system_allows(tmp_path, name):
    atomic_files.write(tmp_path / name, "x")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_temporary_file_may_lie_in_another_folder(tmp_path):
    (tmp_path / "a").mkdir()
    with atomic_files.writing(tmp_path / "a" / "b", tmp_path) as temporary:
        assert list((tmp_path / "a").iterdir()) == []
        assert temporary.parent == tmp_path
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]

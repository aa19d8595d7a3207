"""Only regular files of a bounded size are read, and the message names the file at fault."""

import os

import pytest

from gqa.runtime import regular_files
from gqa.runtime.errors import UserError


def pipe(path):
    os.mkfifo(path)


def sparse(path):
    with open(path, "wb") as file:
        file.truncate(2**40)


def text(content):
    return lambda path: path.write_bytes(content)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "No such file or directory"),
        (lambda path: path.mkdir(), "is a folder; use a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device, a pipe or a socket"),
        (pipe, "is a device, a pipe or a socket"),
        (sparse, "has more than 16,777,216 bytes"),
        (text(b"[" * 10**6), "nested too deeply"),
        (text(b'{"a":' * 10**6), "nested too deeply"),
        (text(b"[1]"), "not a JSON object"),
        (text(b""), "Expecting value"),
        (text(b"\xff\xfe\xff"), "codec can't decode"),
        (text(b'{"a": 1' + b"0" * 5000 + b"}"), "digits"),
        (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
    ],
)
def test_a_file_that_is_no_json_object_is_named(tmp_path, make, message):
    path = tmp_path / "config.json"
    make(path)
    with pytest.raises(UserError, match=f"^{path}: .*{message}"):
        regular_files.read_json(path)


@pytest.mark.parametrize(("name", "message"), [("a" * 300, "name too long"), ("a\0b", "null")])
def test_a_name_that_no_file_can_have_is_refused(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        regular_files.read_json(tmp_path / name)


def test_a_file_of_the_largest_size_is_read(tmp_path):
    """A link to a regular file is one; a byte more than allowed is refused."""
    (tmp_path / "real").write_bytes(b'{"a": [1]}')
    (tmp_path / "link").symlink_to("real")
    assert regular_files.read_json(tmp_path / "link", 10) == {"a": [1]}
    with pytest.raises(UserError, match="has more than 9 bytes"):
        regular_files.read_json(tmp_path / "link", 9)


def test_a_file_that_hides_its_size_is_bounded_too():
    with pytest.raises(UserError, match="has more than 10 bytes"):
        regular_files.read_bytes("/proc/self/status", 10)


@pytest.mark.parametrize(
    ("make", "is_refused"),
    [
        (lambda path: path.symlink_to("../../top/sub/real"), False),
        (lambda path: path.symlink_to("../../../outside/file"), True),
        (lambda path: path.symlink_to("../../../outside"), True),
        (lambda path: path.symlink_to("../sub"), True),  # what it leads to would not be listed
        (lambda path: path.symlink_to("nowhere"), True),
        (pipe, True),
    ],
)
def test_what_leads_out_of_a_folder_is_named_and_not_listed(tmp_path, make, is_refused):
    folder, real = tmp_path / "folder", tmp_path / "folder" / "top" / "sub" / "real"
    for path in (real, tmp_path / "outside" / "file"):
        path.parent.mkdir(parents=True)
        path.write_text("x")
    odd = real.with_name("odd")
    make(odd)
    if is_refused:
        with pytest.raises(UserError, match=r"^top/sub/odd is not a regular file of the folder; "):
            regular_files.list_inside(folder, folder / "top")
    else:
        assert regular_files.list_inside(folder, folder / "top") == [odd, real]
    for name in ("elsewhere", "odd"):
        (folder / name).symlink_to(folder / "top")
        with pytest.raises(UserError, match=f"^{name} is not a regular file of the folder; "):
            regular_files.list_inside(folder, folder / name)

"""Files of torch.save are read as torch reads them, and nothing in them is executed."""

import io
import os
import struct
import zipfile

import numpy as np
import pytest

from gqa.interop import torch_files, torch_pickles, weights, zip_members
from gqa.runtime.errors import CheckpointError, UserError
from tests.support.foreign_weights import (
    ORDERED_DICT,
    REBUILD,
    constant,
    name,
    state,
    storage,
    tensor,
    write_archive,
)

NUMBERS = np.arange(6, dtype=np.float32)


@pytest.fixture
def path(tmp_path):
    return tmp_path / torch_files.SINGLE


def write(path, pickled, **members):
    write_archive(path, pickled, {"0": NUMBERS.tobytes()}, **members)


@pytest.mark.parametrize(
    "options",
    [{}, {"pickle_protocol": 4}, {"_use_new_zipfile_serialization": False}],
    ids=["zip", "protocol 4", "older than torch 1.6"],
)
def test_tensors_are_those_of_torch(path, options):
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    tensors = module.state_dict()  # an OrderedDict with an attribute
    numbers = torch.arange(24.0).reshape(4, 6)
    tensors |= {"shared": numbers, "part": numbers[1:3, ::2], "transposed": numbers.t()}
    tensors |= {"parameter": torch.nn.Parameter(torch.ones(3)), "empty": torch.empty(0, 3)}
    for dtype in ("float64", "float16", "bfloat16"):
        tensors[dtype] = torch.randn(5, 2).to(getattr(torch, dtype))
    torch.save(tensors, path, **options)

    found = weights.open_folder(path.parent)
    assert set(found) == set(tensors)
    for key, expected in tensors.items():
        array = found.read(key)
        assert found.floats(key, tuple(expected.shape)) == array.dtype
        np.testing.assert_array_equal(
            array.astype(np.float64), expected.detach().double().numpy(), key
        )
        count = min(1, len(array))
        np.testing.assert_array_equal(found.read(key, 1, count), array[1:2])
    assert found.read("bfloat16").dtype.name == "bfloat16"
    assert found["shared"].start == found["transposed"].start


def test_files_of_more_than_four_gigabytes_have_places_of_64_bits(tmp_path):
    """Seen from the end of a sparse file that begins with 5 GB of another member."""
    path, size = tmp_path / "large.zip", 5 * 2**30
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("small", b"abc")
    content = path.read_bytes()
    directory = content.index(b"PK\1\2")
    local, entry = content[:directory], bytearray(content[directory : content.index(b"PK\5\6")])
    struct.pack_into("<H", entry, 30, 12)  # the length of the extra field
    struct.pack_into("<L", entry, 42, 2**32 - 1)
    entry += struct.pack("<HHQ", 1, 8, size)
    start = size + len(local)
    end = struct.pack("<4sQHHLLQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, len(entry), start)
    end += struct.pack("<4sLQL", b"PK\6\7", 0, start + len(entry), 1)
    end += struct.pack("<4sHHHHLLH", b"PK\5\6", 0, 0, 1, 1, len(entry), 2**32 - 1, 0)
    with open(path, "wb") as file:
        file.seek(size)
        file.write(local + entry + end)
    with open(path, "rb") as file:
        (member,) = zip_members.members(file).values()
        assert zip_members.read(file, member, 3) == b"abc"


# --- hostile pickles ------------------------------------------------------------------------------

CALL = b"(" + constant("touch executed") + b"tR"
HUGE = 2**62
PICKLES = {
    "a function of the system": (state(a=name("posix.system") + CALL), "asks for 'posix.system'"),
    "eval": (state(a=name("builtins.eval") + CALL), "asks for 'builtins.eval', which is"),
    "torch's own": (state(a=name("torch.hub.load") + CALL), "asks for 'torch.hub.load'"),
    "a part of a known name": (state(a=name("torch._utils.x")), "asks for 'torch._utils.x'"),
    "by stack": (state(a=b"\x8c\x02os\x8c\x06system\x93" + CALL), "asks for 'os.system'"),
    "not by text": (state(a=b"K\1K\2\x93" + CALL), "asks for ''"),
    "INST": (b"\x80\x02(iposix\nsystem\n.", "instruction INST, which describes no"),
    "NEWOBJ": (state(a=name(ORDERED_DICT) + b")\x81"), "instruction NEWOBJ"),
    "an odd text": (b"\x80\x02S'\\q'\n.", "instruction STRING"),
    "EXT1": (state(a=b"\x82\1"), "instruction EXT1"),
    "a storage is called": (state(a=name("torch.FloatStorage") + b")R"), "calls torch.Float"),
    "a tensor is called": (state(a=tensor() + b")R"), "calls something that has no name"),
    "arguments of a dict": (state(a=name(ORDERED_DICT) + CALL), "calls collections.Ordered"),
    "arguments of a tensor": (state(a=name(REBUILD) + CALL), "calls torch._utils._rebuild"),
    "the state of a tensor": (state(a=tensor() + b"}b"), "is damaged"),
    "a reference to something else": (state(a=constant(("x", 3)) + b"Q"), "else than a storage"),
    "another storage": (state(a=tensor(stored=storage("X"))), "asks for 'torch.X'"),
    "part of a storage": (state(a=tensor(stored=storage(extra=constant((0, 1))))), "else than a"),
    "no dict": (b"\x80\x02]" + constant(1) + b"a.", "does not hold a state dict"),
    "other entries": (state(a=tensor(), epoch=constant(3)), "entry 'epoch' is not a tensor"),
    "two entries": (b"\x80\x02}(" + 2 * (constant("a") + tensor()) + b"u.", "two entries 'a'"),
    "a key that is no text": (b"\x80\x02}(K\1" + tensor() + b"u.", "a key that is no text"),
    "deep nesting": (b"\x80\x02" + b"](" * 50_000 + b"e" * 50_000 + b".", "state dict|damaged"),
    "deep nesting of tuples": (b"\x80\x02)" + b"\x85" * 100_000 + b".", "does not hold a state"),
    "a size that overflows": (state(a=tensor((HUGE, HUGE), (1, 1))), "outside of its storage"),
    "a stride that overflows": (state(a=tensor((2, 3), (HUGE, 1))), "outside of its storage"),
    "an offset that overflows": (state(a=tensor(offset=HUGE)), "outside of its storage"),
    "one number too far": (state(a=tensor(offset=1)), "outside of its storage of 6 numbers"),
    "strides of 0": (state(a=tensor((1000, 1000), (0, 0))), "outside of its storage"),
    "a number of 2000 bits": (state(a=tensor((2**2000, 1))), "is not a whole number that"),
    "a negative stride": (state(a=tensor((2, 3), (-3, 1), 3)), "is not a whole number that can be"),
    "true as a size": (state(a=tensor((True, 3))), "is not a whole number that can be right"),
    "more sizes than strides": (state(a=tensor((1, 2, 3))), "has 3 sizes and 2 strides"),
    "many axes": (state(a=tensor((1,) * 99, (1,) * 99)), "has 99 sizes and 99 strides"),
    "a storage of another size": (state(a=tensor(stored=storage(numel=7))), "24 bytes instead of"),
    "a storage that is not there": (state(a=tensor(stored=storage(key="1"))), "no member data/'1'"),
    "a storage out of the folder": (state(a=tensor(stored=storage(key="../x"))), "no member data/"),
    "an early end": (state(a=tensor())[:-9], "is damaged"),
    "an empty stack": (b"\x80\x02R.", "is damaged"),
    "no mark": (b"\x80\x02t.", "is damaged"),
    "nothing remembered": (b"\x80\x02h\5.", "is damaged"),
    "no pickle": (b"\xff" * 50, "is damaged"),
    "nothing": (b"", "is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("case", PICKLES)
def test_a_pickle_that_is_more_than_tensors_is_refused(path, case, monkeypatch):
    monkeypatch.chdir(path.parent)
    pickled, message = PICKLES[case]
    write(path, pickled)
    with pytest.raises(CheckpointError, match=rf"pytorch_model\.bin: .*({message})") as error:
        weights.open_folder(path.parent)
    assert len(str(error.value)) < 400
    assert os.listdir() == [path.name]


def test_what_is_odd_and_harmless_is_read(path):
    """An index of the memo that would take gigabytes of a list, and bytes between tensors."""
    far = b"r" + struct.pack("<L", 2**32 - 1)
    write(path, state(a=tensor() + far, b=tensor((3,), (2,), 1)))
    found = weights.open_folder(path.parent)
    np.testing.assert_array_equal(found.read("a"), NUMBERS.reshape(2, 3))
    np.testing.assert_array_equal(found.read("b"), NUMBERS[1::2])


def test_long_pickles_are_refused(path, monkeypatch):
    monkeypatch.setattr(torch_pickles, "MAX_INSTRUCTIONS", 100)
    write(path, b"\x80\x02" + b"N0" * 100 + b".")
    with pytest.raises(CheckpointError, match=r"has the instruction POP, which describes no"):
        weights.open_folder(path.parent)
    write(path, b"\x80\x02" + b"N" * 101 + b".")
    with pytest.raises(CheckpointError, match="its pickle has more than 100 instructions"):
        weights.open_folder(path.parent)
    monkeypatch.setattr(torch_files, "MAX_PICKLE_BYTES", 99)
    with pytest.raises(CheckpointError, match=r"data\.pkl' has more than 99 bytes"):
        weights.open_folder(path.parent)


def test_a_small_part_of_a_large_storage_is_refused(path, monkeypatch):
    """Reading it would take the memory of the storage."""
    monkeypatch.setattr(torch_files, "PIECE", 0)
    write_archive(path, state(a=tensor((2,), (19,), 0, storage(numel=20))), {"0": bytes(80)})
    with pytest.raises(
        CheckpointError, match="tensor 'a' is a small part of a large storage; save"
    ):
        weights.open_folder(path.parent)


# --- hostile zip files ----------------------------------------------------------------------------


def test_members_that_torch_does_not_write_are_refused(path):
    pickled = state(a=tensor())
    cases = {
        "is a program of TorchScript": {"constants.pkl": b""},
        "are not little-endian": {"byteorder": b"big"},
        "has 2 members data.pkl instead of one": {"../data.pkl": b""},
    }
    for message, members in cases.items():
        write(path, pickled, **members)
        if "../data.pkl" in members:
            with zipfile.ZipFile(path, "a") as archive:
                archive.writestr("other/data.pkl", b"")
        with pytest.raises(CheckpointError, match=message):
            weights.open_folder(path.parent)

    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))
    assert path.stat().st_size < 10**5  # a bomb
    with pytest.raises(CheckpointError, match=r"'archive/data\.pkl' is compressed or encrypted"):
        weights.open_folder(path.parent)

    write(path, pickled)
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", bytes(24))
    with pytest.raises(CheckpointError, match="has two members 'archive/data/0'; save"):
        weights.open_folder(path.parent)


def test_every_cut_is_noticed(path):
    write(path, state(a=tensor()))
    content = path.read_bytes()
    for length in range(4, len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"; copy the file again"):
            weights.open_folder(path.parent)


def test_places_outside_of_the_file_are_refused(path):
    write(path, state(a=tensor()))
    content = path.read_bytes()
    entry = content.rindex(b"PK\1\2")  # of the storage
    for offset, value, message in (
        (24, 10**6, "compressed"),
        (42, 2**31, "is cut off"),
        (42, 3, "has no header"),
        (0, 0, "directory of the zip file is damaged"),
    ):
        changed = bytearray(content)
        struct.pack_into("<L", changed, entry + offset, value)
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match=message):
            weights.open_folder(path.parent)
    for offset, message in ((12, "directory has more than"), (16, "lies outside of the file")):
        changed = bytearray(content)
        struct.pack_into("<L", changed, content.rindex(b"PK\5\6") + offset, 2**31)
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match=message):
            weights.open_folder(path.parent)


def test_pipes_and_pointers_are_no_weights(path):
    for make in (os.mkfifo, lambda path: os.symlink("/dev/zero", path)):
        make(path)
        with pytest.raises(UserError, match="is a device, a pipe or a socket"):
            weights.open_folder(path.parent)
        path.unlink()
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: is a pointer of Git LFS"):
        weights.open_folder(path.parent)


def test_an_old_file_whose_storages_lie_is_refused(path):
    start = b"".join(b"\x80\x02" + constant(x) + b"." for x in (torch_files.OLD_MAGIC, 1001))
    system = b"\x80\x02" + constant({"little_endian": True}) + b"."
    keys = b"\x80\x02" + constant(["0"]) + b"."
    whole = start + system + state(a=tensor()) + keys + struct.pack("<Q", 6) + NUMBERS.tobytes()
    path.write_bytes(whole)
    np.testing.assert_array_equal(weights.open_folder(path.parent).read("a").ravel(), NUMBERS)
    for content, message in {
        whole[:-1]: "list of storages is damaged",
        whole.replace(struct.pack("<Q", 6), b"\xff" * 8): "list of storages is damaged",
        whole.replace(keys, b"\x80\x02]."): "has 0 bytes instead of 24",
        whole.replace(system, b"\x80\x02}."): "not little-endian",
        system + whole: "is not a file that torch.save has written",
        io.BytesIO(b"no file of torch").read(): "is damaged",
    }.items():
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            weights.open_folder(path.parent)

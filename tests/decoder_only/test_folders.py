"""The folders of a conversion: what is refused, copied, left out, and left behind."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from gqa.decoder_only import convert, layout
from gqa.decoder_only.target_folder import RECORD
from gqa.runtime.errors import UserError
from tests.support.llama_folders import H, N, write_llama

ROOT = Path(__file__).parent.parent.parent
K_PROJ = "model.layers.0.self_attn.k_proj.weight"


def quietly(*arguments):
    said = []
    convert.convert(*arguments, report=said.append)
    return said


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [K_PROJ, "model.embed_tokens.weight"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_numbers_that_are_none_are_named_before_anything_is_written(tmp_path, value, name, dtype):
    import ml_dtypes

    array = np.ones((64, 32), getattr(ml_dtypes, dtype, None) or dtype)
    array[5, 3] = value
    write_llama(tmp_path / "a", change={name: array})
    message = rf"model-00001-of-00002\.safetensors: tensor {name} has NaN or infinite numbers; use"
    with pytest.raises(UserError, match=message):
        quietly(tmp_path / "a", tmp_path / "b", 2)
    assert not (tmp_path / "b").exists()


def test_whole_numbers_are_not_checked_for_nan(tmp_path):
    """The bytes of these integers would be NaN as floats."""
    counts = np.full((2, 2), -1, np.int32)
    write_llama(tmp_path / "a", change={"model.counts": counts})
    quietly(tmp_path / "a", tmp_path / "b", 2)
    new = load_file(tmp_path / "b" / "model-00002-of-00002.safetensors")
    np.testing.assert_array_equal(new["model.counts"], counts)


def test_side_files_that_may_hold_the_old_heads_are_left_out_and_named(tmp_path):
    write_llama(tmp_path / "a")
    copied = ("tokenizer_config.json", "chat_template.jinja", "LICENSE", "README.md", "merges.txt")
    old = ("model.onnx", "model.Q4.gguf", "params.json", "consolidated.00.pth", "dot.npz")
    for name in (*copied, *old, "generation_config.json", ".gitattributes", RECORD):
        (tmp_path / "a" / name).write_text(name)
    for name in ("additional_chat_templates/tool.jinja", "original/params.json"):
        (tmp_path / "a" / name).parent.mkdir()
        (tmp_path / "a" / name).write_text(name)
    (tmp_path / "a" / "additional_chat_templates" / "x.onnx").write_text("")
    os.mkfifo(tmp_path / "a" / "vocab.json")
    said = quietly(tmp_path / "a", tmp_path / "b", 2)
    left_out = {"additional_chat_templates/x.onnx", "original/", "pytorch_model.bin", "vocab.json"}
    start = "left out (old heads, or a link out of the folder): "
    assert said[-2].startswith(start)
    assert set(said[-2].removeprefix(start).split(", ")) == left_out | {*old}
    present = {str(x.relative_to(tmp_path / "b")) for x in (tmp_path / "b").rglob("*")}
    weights = {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    assert present == weights | {*copied, "additional_chat_templates", RECORD} | {
        "additional_chat_templates/tool.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
    }


def test_links_out_of_the_folder_are_left_out_but_for_those_of_the_hubs_cache(tmp_path):
    """Who publishes the new folder would publish the private file that a link leads to."""
    for name in ("blobs", "snapshots"):
        (tmp_path / name).mkdir()
    for path in (tmp_path / "private", tmp_path / "blobs" / "1"):
        path.write_text("x")
    write_llama(tmp_path / "snapshots" / "a")
    source = tmp_path / "snapshots" / "a"
    (source / "README.md").symlink_to("../../private")
    (source / "LICENSE").symlink_to("../../blobs/1")
    (source / "merges.txt").symlink_to("tokenizer.json")
    (source / "additional_chat_templates").symlink_to("../..")
    (tmp_path / "tokenizer.jinja").write_text("x")
    said = quietly(source, tmp_path / "b", 2)
    assert {"README.md", "additional_chat_templates/tokenizer.jinja"} <= {
        *said[-2].partition(": ")[2].split(", ")
    }
    names = {path.name for path in (tmp_path / "b").rglob("*")}
    assert {"LICENSE", "merges.txt"} <= names
    assert not {"README.md", "tokenizer.jinja"} & names
    source.rename(tmp_path / "a")
    (tmp_path / "a" / "LICENSE").unlink()
    (tmp_path / "a" / "LICENSE").symlink_to("../blobs/1")
    assert "LICENSE" in quietly(tmp_path / "a", tmp_path / "c", 2)[-2]


def test_a_converted_model_is_converted_again_under_its_own_record(tmp_path):
    """The source's record is not taken over: the second conversion can be run again."""
    write_llama(tmp_path / "a")
    quietly(tmp_path / "a", tmp_path / "b", 4)
    quietly(tmp_path / "b", tmp_path / "c", 2)
    assert json.loads((tmp_path / "c" / RECORD).read_text())["num_key_value_heads"] == 2
    assert len(quietly(tmp_path / "b", tmp_path / "c", 2)) == 1  # no file is written again
    quietly(tmp_path / "a", tmp_path / "direct", 2)
    for path in (tmp_path / "direct").glob("*.safetensors"):
        ours, direct = load_file(tmp_path / "c" / path.name), load_file(path)
        for name, array in direct.items():
            np.testing.assert_allclose(ours[name], array, atol=1e-6)


def with_errors(change):
    return lambda record: record | {"errors": change(record["errors"])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record | {"errors": []}, "done and errors are no objects"),
        (lambda record: record | {"done": 7}, "done and errors are no objects"),
        (lambda record: record | {"done": {}}, "it has errors of 2 layers where 0 are finished"),
        (with_errors(lambda x: {"0": x["0"]}), "it has errors of 1 layers where 2 are finished"),
        (with_errors(lambda x: {"0": x["0"], "2": x["1"]}), "it has errors of 2 layers where 2"),
        (with_errors(lambda x: x | {"0": 7}), "the errors of layer 0 are not those of k and v"),
        (with_errors(lambda x: x | {"1": {"k": x["1"]["k"]}}), "the errors of layer 1 are not"),
        *(
            (
                with_errors(lambda x, bad=bad: x | {"1": x["1"] | {"v": x["1"]["v"] | bad}}),
                "the errors of v in layer 1 are ",
            )
            for bad in ({"norm": np.nan}, {"mean": -1.0}, {"mean": np.inf}, {"first": True},
                        {"first": "1"}, {"svd": 1.0})
        ),
    ],
)  # fmt: skip
def test_a_record_with_errors_that_no_conversion_notes_is_damaged(tmp_path, change, message):
    write_llama(tmp_path / "a")
    quietly(tmp_path / "a", tmp_path / "b", 2)
    path = tmp_path / "b" / RECORD
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(UserError, match=f"{RECORD} is damaged: {message}.*; delete .*/b and conve"):
        quietly(tmp_path / "a", tmp_path / "b", 2)


def test_half_written_files_of_a_killed_run_are_deleted(tmp_path):
    """Also those of a run that was killed before it had written its record."""
    write_llama(tmp_path / "a")
    (tmp_path / "b").mkdir()
    half = tmp_path / "b" / "model-00001-of-00002.safetensors.123.tmp"
    half.write_bytes(b"half")
    quietly(tmp_path / "a", tmp_path / "b", 2)
    assert not half.exists()
    half.write_bytes(b"half")
    quietly(tmp_path / "a", tmp_path / "b", 2)
    assert not list((tmp_path / "b").glob("*.tmp"))


def test_a_folder_that_another_process_writes_to_is_left_alone(tmp_path):
    write_llama(tmp_path / "a")
    (tmp_path / "b").mkdir()
    half = tmp_path / "b" / "x.tmp"
    half.write_bytes(b"half")
    descriptor = os.open(tmp_path / "b", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="b: another process writes to it"):
        quietly(tmp_path / "a", tmp_path / "b", 2)
    os.close(descriptor)
    assert half.exists()


def place_below_a_file(path):
    path.write_text("")
    return path / "c"


def place_of_a_file(path):
    path.write_text("")
    return path


def place_of_a_dangling_link(path):
    path.symlink_to("nowhere")
    return path


def place_in_the_model(path):
    return path.parent / "a" / "b"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (place_below_a_file, "b is a file; name a folder elsewhere"),
        (place_of_a_file, "b: is a file; name a new or empty folder"),
        (place_of_a_dangling_link, "b: is a link that leads nowhere"),
        (place_in_the_model, "lies in the model's folder; name a folder outside"),
        (lambda path: Path("/proc/b"), "/proc/b"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_the_weights_are_read(
    tmp_path, place, message, monkeypatch
):
    write_llama(tmp_path / "a")
    if "proc" not in message:
        monkeypatch.setattr(convert, "check_finite", None)
    with pytest.raises((UserError, OSError), match=message):
        quietly(tmp_path / "a", place(tmp_path / "b"), 2)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_forbidden_place_is_refused(tmp_path):
    write_llama(tmp_path / "a")
    (tmp_path / "b").mkdir(mode=0o500)
    for target in (tmp_path / "b", tmp_path / "b" / "c"):
        with pytest.raises(UserError, match="b cannot be written; name a folder elsewhere"):
            quietly(tmp_path / "a", target, 2)


def command(tmp_path, target, prefix=()):
    line = [sys.executable, "-m", "gqa", "convert", tmp_path / "a", target, "--num-kv-heads=2"]
    return subprocess.Popen(
        [*prefix, *line], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("b" * 300, "File name too long"),
        ("/dev/full/b", "is a file"),
        ("/proc/b", "/proc/b: No such file or directory; name a folder elsewhere"),
    ],
)
def test_the_command_tells_a_bad_target_in_one_line(tmp_path, target, message):
    write_llama(tmp_path / "a")
    process = command(tmp_path, tmp_path / target)
    _, err = process.communicate()
    assert (process.returncode, err.count("\n")) == (2, 1)
    assert message in err


def test_a_limit_on_the_size_of_files_is_told_in_one_line(tmp_path):
    write_llama(tmp_path / "a")
    process = command(tmp_path, tmp_path / "b", ["bash", "-c", 'ulimit -f 4; exec "$@"', "bash"])
    _, err = process.communicate()
    assert (process.returncode, err.count("\n")) == (2, 1)
    assert "File too large; raise the limit on the size of files (ulimit -f)" in err
    assert not list((tmp_path / "b").glob("*.tmp"))


SLOWLY = """
import sys, time
from gqa.interop import safetensors_files
from gqa.interop.safetensors_files import Tensors
from gqa.runtime import command_line
from gqa import __main__

pieces = Tensors.pieces

def slowly(self, name):
    if sys._getframe(1).f_code.co_name == "write":
        print("writing", flush=True)
        time.sleep(60)
    yield from pieces(self, name)

Tensors.pieces = slowly
sys.exit(__main__.main())
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_leaves_no_temporaries_and_continues(tmp_path, signum):
    write_llama(tmp_path / "a")
    arguments = ["convert", tmp_path / "a", tmp_path / "b", "--num-kv-heads=2"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWLY, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "writing\n"
    time.sleep(0.2)
    process.send_signal(signum)
    _, err = process.communicate(timeout=50)
    assert (process.returncode, err.count("\n")) == (128 + signum, 1)
    assert err.startswith("stopped: interrupted by ")
    assert [path.name for path in (tmp_path / "b").iterdir()] == [RECORD]
    assert quietly(tmp_path / "a", tmp_path / "b", 2)[-1].startswith(f"{N} -> 2 KV heads")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"rope_parameters": "default"}, "rope_parameters='default'; use an object, or remove"),
        ({"rope_scaling": [1]}, r"rope_scaling=\[1\]; use an object, or remove it"),
        ({"partial_rotary_factor": "all"}, "partial_rotary_factor='all'; use a number above 0"),
        ({"partial_rotary_factor": True}, "partial_rotary_factor=True; use a number above 0"),
        ({"partial_rotary_factor": float("nan")}, "partial_rotary_factor=nan; use a number"),
        ({"partial_rotary_factor": 10**400}, "partial_rotary_factor=1000.*; use a number"),
        ({"rope_scaling": {"partial_rotary_factor": []}}, r"partial_rotary_factor=\[\]; use a"),
        (
            {"rope_parameters": {"full_attention": {"partial_rotary_factor": 0.5}}},
            "partial_rotary_factor=0.5 is ignored by Transformers' llama",
        ),
        (
            {
                "model_type": "phi",
                "rope_parameters": {"partial_rotary_factor": 0.5},
                "partial_rotary_factor": 0.25,
            },
            r"partial_rotary_factor has the values \[0.25, 0.5\]; remove the wrong one",
        ),
    ],
)
def test_rope_settings_that_svd_cannot_trust_are_refused(tmp_path, more, message):
    write_llama(tmp_path / "a", **more)
    with pytest.raises(UserError, match=message):
        quietly(tmp_path / "a", tmp_path / "b", 2, "svd")
    quietly(tmp_path / "a", tmp_path / "c", 2, "mean")  # which RoPE does not concern


def test_how_many_coordinates_rope_rotates():
    sizes = {"num_attention_heads": N, "hidden_size": N * H, "num_hidden_layers": 1}

    def rotary(**config):
        return layout.read_sizes(sizes | config, 2, "svd", Path("config.json")).rotary

    assert rotary(model_type="llama") == H
    assert rotary(model_type="qwen2", rope_parameters={"rope_theta": 1e4}) == H
    assert rotary(model_type="llama", partial_rotary_factor=1) == H
    assert rotary(model_type="phi") == H // 2
    assert rotary(model_type="phi", rope_parameters={"partial_rotary_factor": 0.25}) == H // 4
    assert rotary(model_type="phi", rope_scaling=None, partial_rotary_factor=1.0) == H


@pytest.mark.parametrize("name", ["model.gguf", "consolidated.00.pth", "pytorch_model.bin"])
def test_weights_in_another_format_alone_are_named(tmp_path, name):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / name).write_text("")
    with pytest.raises(UserError, match=f"{name}: is of a format that is not read; save the"):
        quietly(tmp_path / "a", tmp_path / "b", 2)


def test_addresses_are_told_what_to_do(tmp_path):
    write_llama(tmp_path / "a")
    with pytest.raises(UserError, match="target='gs://bucket/b' is a URL; mount the"):
        quietly(tmp_path / "a", "gs://bucket/b", 2)
    assert os.listdir(tmp_path) == ["a"]


def test_a_pointer_of_git_lfs_is_not_copied(tmp_path):
    write_llama(tmp_path / "a")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (tmp_path / "a" / "tokenizer.json").write_text(pointer)
    with pytest.raises(UserError, match=r"tokenizer\.json: is a pointer of Git LFS"):
        quietly(tmp_path / "a", tmp_path / "b", 2)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_beside_the_model_is_refused(tmp_path, name):
    write_llama(tmp_path / "a")
    (tmp_path / "a" / name).write_text("{}")
    with pytest.raises(UserError, match=f"{name}: an adapter changes the model"):
        quietly(tmp_path / "a", tmp_path / "b", 2)


def test_another_file_of_weights_that_the_config_chooses_is_refused(tmp_path):
    write_llama(tmp_path / "a")
    path = tmp_path / "a" / "config.json"
    config = json.loads(path.read_text()) | {"transformers_weights": "other.safetensors"}
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.json: transformers_weights chooses a file"):
        quietly(tmp_path / "a", tmp_path / "b", 2)
    assert not (tmp_path / "b").exists()

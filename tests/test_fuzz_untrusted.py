"""Mutations of valid files from strangers: a right result, or exit status 2 with one line.

Each mutation is read in a process of its own, with 2 GiB of memory and 20 seconds of computing.
By default each kind of file has a few mutations; GQA_FUZZ=1000 tries that many in all.
"""

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from gqa.checkpoints import checksums
from gqa.checkpoints.checkpoint import Checkpoints
from gqa.data import tokenizer
from gqa.interop import huggingface
from gqa.interop.huggingface import writing
from tests.support.prepared_datasets import prepare, trivia_row

TRIALS = int(os.environ.get("GQA_FUZZ", "50"))
MEMORY = 2 * 2**30
SECONDS = 20
ROOT = Path(__file__).parent.parent

RECORDS = "trivia_qa-train.array_record-00000-of-00001"

ODD = [None, True, 0, -1, 3, 2**31, 2**70, 10**300, 0.5, "", "x", "../../x", "\x1b[31m", "\u202e"]
ODD += ["/dev/zero", "file:///etc/passwd", "a" * 70_000, [], [[]], {}, {"a": {"b": 1}}]

# What reads each kind of file, given the folder. It runs behind the library's own command line.
READERS = {
    "kv-cache": "run_command(['kv-cache', f'{folder}/config.json', '--length=128'])",
    "export": "run_command(['export', folder, os.path.join(folder, 'out')])",
    "load": """
        from gqa.interop import huggingface
        params, config = huggingface.load(folder)
        arrays = map(np.asarray, jax.tree.leaves(params))  # sums of JAX would be compiled
        print(config, sum(float(abs(x).sum()) for x in arrays))
    """,
    "tfds": """
        from gqa.data import tfds
        records = tfds.records("trivia_qa/rc", folder, "train")
        print(len(records), records[0])
    """,
    "vocabulary": """
        from gqa.data import tokenizer
        vocabulary = tokenizer.load(os.path.join(folder, "spiece.model"))
        ids = vocabulary.encode("the cat \\uff1f <extra_id_3> \\u65e5 " + "a" * 1000)
        assert all(0 <= token < vocabulary.vocab_size for token in ids)
        print(vocabulary.normalize("the \\uff1f"), vocabulary.decode(range(vocabulary.vocab_size)))
    """,
}

# A server: it imports everything once and forks for each folder it is told, before JAX has started
# any thread. Each line it answers is the exit status, or what went wrong.
SERVER = """
import json, os, resource, signal, sys, traceback
import jax, flax.linen, numpy as np, optax, tensorflow_datasets
from orbax.checkpoint import v1
import gqa.checkpoints.checkpoint, gqa.interop.huggingface.command
import gqa.kv_cache.command, gqa.data.tfds, gqa.data.tokenizer
from gqa.__main__ import run_command
from gqa.runtime import command_line

def read(code, folder):
    virtual = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (virtual + 4 * MEMORY,) * 2)  # stacks count, too
    names = {"folder": folder, "os": os, "jax": jax, "np": np, "run_command": run_command}
    return command_line.status(lambda: exec(code, names))

for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        # Other processes may use the cores, so the clock bounds only what waits for ever.
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.alarm(30 * SECONDS)
        output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
        try:
            status = read(request["code"], request["folder"])
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        os._exit(status)
    _, status, usage = os.wait4(child, 0)
    print(os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024, flush=True)
"""


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """A function that reads a folder in a process of its own: exit status and output."""
    folder = tmp_path_factory.mktemp("server")
    script = f"MEMORY, SECONDS = {MEMORY}, {SECONDS}\n" + SERVER
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        cwd=folder,
        text=True,
    ) as server:

        def read(reader, target):
            request = {"code": textwrap.dedent(READERS[reader]), "folder": str(target)}
            server.stdin.write(json.dumps(request | {"output": str(folder / "output")}) + "\n")
            server.stdin.flush()
            status, peak = map(int, server.stdout.readline().split())
            assert peak < MEMORY, f"{target}: {peak / 2**30:.1f} GiB"
            return status, (folder / "output").read_text(errors="replace")

        yield read
        server.stdin.close()


# --- mutations ------------------------------------------------------------------------------------


def mutate(content, rng):
    """Return a file's bytes with some values of its JSON replaced, or some bytes of it changed."""
    try:
        value = json.loads(content)
    except ValueError:
        value = None
    if value is None or rng.random() < 0.25:
        return mutate_bytes(content, rng)
    for _ in range(rng.randint(1, 3)):
        value = replace(value, rng)
    text = json.dumps(value)
    return (text if rng.random() < 0.95 else "[" * 5000 + text).encode()


def mutate_bytes(content, rng):
    data = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        place = rng.randrange(len(data) + 1)
        kind = rng.randrange(4)
        if kind == 0:
            data[place:] = b""
        elif kind == 1:
            data[place:place] = rng.randbytes(rng.randint(1, 8))
        elif kind == 2:
            del data[place : place + rng.randint(1, 16)]
        elif place < len(data):
            data[place] ^= 1 << rng.randrange(8)
    return bytes(data)


def replace(value, rng):
    """Replace, remove or add something somewhere in JSON."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value))
        kind = rng.random()
        if kind < 0.15:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.25:
            return value | {rng.choice(["x", "", "../x", "__class__", key * 2]): value[key]}
        return value | {key: replace(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        place = rng.randrange(len(value))
        return [*value[:place], replace(value[place], rng), *value[place + 1 :]]
    return rng.choice([*ODD, value])


# --- valid folders --------------------------------------------------------------------------------


def t5_folder(folder, tiny, random_params):
    huggingface.save(random_params(tiny), tiny, folder)


def sharded_folder(folder, tiny, random_params, monkeypatch):
    monkeypatch.setattr(writing, "MAX_SHARD_BYTES", 16 * 1024)
    t5_folder(folder, tiny, random_params)
    assert (folder / "model.safetensors.index.json").exists()


def step_folder(folder, tiny, random_params):
    info = {"model": dataclasses.asdict(tiny), "vocabulary": "0" * 64}
    with Checkpoints(folder) as checkpoints:
        items = {"params": random_params(tiny), "config": info}
        checkpoints.save(1, items, {"validation_loss": 1.0})
    shutil.copytree(folder / "1", folder, dirs_exist_ok=True)
    shutil.rmtree(folder / "1")


def config_folder(folder):
    """The config of a decoder with windows in some of its layers."""
    config = {"model_type": "gemma2", "num_hidden_layers": 4, "num_attention_heads": 8}
    config |= {"num_key_value_heads": 4, "head_dim": 16, "hidden_size": 64}
    config |= {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"] * 2}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def folders(tmp_path, tiny, random_params, monkeypatch):
    """The valid folder of each reader, and the files in it that are mutated."""
    names = ("config", "t5", "sharded", "step", "tfds", "vocabulary")
    parts = {name: tmp_path / name for name in names}
    config_folder(parts["config"])
    t5_folder(parts["t5"], tiny, random_params)
    sharded_folder(parts["sharded"], tiny, random_params, monkeypatch)
    step_folder(parts["step"], tiny, random_params)
    prepare(parts["tfds"], "trivia_qa/rc", trivia_row, splits=("train",))
    tokenizer.train(["the cat sat on the mat"] * 20, 460, parts["vocabulary"] / "spiece.model")
    (info,) = parts["tfds"].rglob("features.json")
    version = info.parent.relative_to(parts["tfds"])
    return [
        ("kv-cache", parts["config"], ["config.json"]),
        ("load", parts["t5"], ["config.json", "model.safetensors"]),
        ("load", parts["sharded"], ["model.safetensors.index.json", "config.json"]),
        (
            "export",
            parts["step"],
            ["checksums.json", "_CHECKPOINT_METADATA", "params/_METADATA", "params/_sharding"],
        ),
        (
            "tfds",
            parts["tfds"],
            [
                f"{version}/{name}"
                for name in ("features.json", "dataset_info.json", RECORDS, RECORDS)
            ],
        ),
        ("vocabulary", parts["vocabulary"], ["spiece.model"]),
    ]


# --- the tests ------------------------------------------------------------------------------------


def test_valid_files_are_read(read, folders):
    for reader, folder, _ in folders:
        status, output = read(reader, folder)
        assert status == 0, f"{reader}: {output}"


def test_a_mutation_gives_a_result_or_one_line(read, folders, tmp_path):
    rng, refused, faults = random.Random(0), 0, []
    for trial in range(TRIALS):
        reader, valid, files = folders[trial % len(folders)]
        folder = tmp_path / "mutated"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(valid, folder)
        name = rng.choice([file for file in files if (folder / file).exists()])
        path = folder / name
        path.write_bytes(mutate(path.read_bytes(), rng))

        # A stranger seals what he has changed.
        if reader == "export" and name != "checksums.json" and rng.random() < 0.8:
            checksums.write(folder, {"validation_loss": 1.0})

        status, output = read(reader, folder)
        lines = [line for line in output.splitlines() if line.startswith("error: ")]
        refused += status == 2
        # One line and nothing beside it: no warning of a library, no traceback.
        is_line = output.splitlines() == lines and len(lines) == 1 and lines[0].isprintable()
        if not (status == 0 or (status == 2 and is_line)) or "Traceback" in output:
            faults.append(f"{trial}: {reader} {name}: status {status}: {output[-600:]}")
    assert not faults, "\n".join(faults)
    assert refused > TRIALS / 4

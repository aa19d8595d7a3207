"""Whatever is typed or stands in a file: the job begins, or one line names what is wrong.

The keys are read off the config, so that a new one is covered by its kind from its first day.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import io
import shutil
import sys
from pathlib import Path

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import launch
from configs import docstrings
from configs.sizes import SIZES
from experiments.graph.validate import CHOICES, ZERO_TOO, flatten
from experiments.stages import text
from gqa import conversion
from gqa.model.activations import GATED_GELU, RELU
from gqa.model.config import REMAT
from gqa.runtime.mesh import KV_HEADS
from gqa.training import progress

ROOT = Path(launch.__file__).parent
# The main job does not read the section aot, whose mistakes are in test_aot.
KEYS = {key: value for key, value in flatten(docstrings.get_config()) if not key.startswith("aot.")}
NAMES = CHOICES | {
    "experiment": ("pipeline",),
    "compare": ("", "mean@0,svd@0", " first , svd-weight@.5"),
    "convert.method": (*conversion.CLOSED, "none"),
    "convert.space": tuple(conversion.SPACES),
    "convert.grouping": tuple(conversion.GROUPINGS),
    "model.activation": (GATED_GELU, RELU),
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": tuple(REMAT),
    "mesh.kv_heads": KV_HEADS,
    "mesh.model": ("1",),  # here is one device
    "mesh.slices": ("1",),
    "wandb.mode": progress.MODES if importlib.util.find_spec("wandb") else ("off",),
    "pretrain.task": ("docstrings", "parameter_qa", "docstring_summary", "code_summary"),
    "finetune.tasks": ("parameter_qa", "docstring_summary,code_summary", " code_summary ,", " , "),
    "text.packages": ("flax,optax", "rich, fsspec,absl-py"),
    "text.vocabulary": ("",),
    "train.profile": ("", "100:110", "0:1"),
    "init.huggingface": ("",),
    "init.t5x": ("",),
}
# What is wrong with a key beyond its kind; the last part of a key stands for all sections.
WRONG = {
    "uptrain.alpha": ["1.01", "3"],
    "evaluate.top_p": ["0", "1.5"],
    "dropout_rate": ["1", "1.0001", "7"],
    "num_microbatches": ["3", "5", "16"],
    "num_kv_heads_encoder": ["3", "32"],
    "num_kv_heads_self_attention": ["5", "32"],
    "num_kv_heads_cross_attention": ["7", "17"],
    "model.num_heads": ["3", "24"],
    "model.vocab_size": ["1", "453"],
    "pretrain.inputs_length": ["1", "3", "1810", "2147483647"],
    "pretrain.task": ["docstrings,parameter_qa", ""],
    "finetune.tasks": ["docstrings", "no_task"],
    "text.packages": ["flax", "optax", "a b", "../flax", ","],
    "text.vocabulary": ["/", ".", "README.md", "no/where.model"],
    "init.huggingface": ["/", ".", "README.md", "no/where", "x" * 300],
    "init.t5x": ["/", ".", "README.md", "no/where", "x" * 300],
}
SECTIONS = sorted({name.partition(".")[0] for name in KEYS if "." in name})
BIG = ["1e30", "1e400", str(2**63), str(2**31), "9" * 5000, "0x" + "f" * 5000]
NO_NUMBER = [
    *("", " ", "abc", "None", "True", "nan ", "()", "1,2", "[1]", "{}", "'4'", '"4"', "--1", "1 2"),
    *(
        "4e",
        "0x",
        "1\n2",
        "²",
        "½",
        "\x1b[31m",
        "\u2028",
        "$(ls)",
        "--config",
        "=1",
        "4;5",
        "None\r",
    ),
]
NO_INT = ["1.5", "1e3", "nan", "inf", "-inf", "-1", "-0.0", str(-(2**63)), *BIG, *NO_NUMBER]
NO_FLOAT = ["nan", "inf", "-inf", "NaN", "1e400", "-1", "-1e-3", "-1e30", *NO_NUMBER]
NO_BOOL = ["", "maybe", "2", "-1", "1.0", "None", "yes", "()", "true false", "\n"]

once = functools.partial(settings, deadline=None, derandomize=True, database=None)


@pytest.fixture(scope="module", autouse=True)
def stubs():
    """The job begins where its text is made. A package's metadata is looked up once."""
    cache = jax.config.jax_compilation_cache_dir
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(text, "prepare", _begin)
        find = functools.cache(importlib.metadata.distribution)
        patch.setattr(importlib.metadata, "distribution", find)
        yield
    jax.config.update("jax_compilation_cache_dir", cache)


class Begun(Exception):
    """The job would run now."""


def _begin(*_):
    raise Begun


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "runs"


def run(workdir, *arguments, config="configs/docstrings.py"):
    """None if the job begins, else the one line that says what is wrong."""
    shutil.rmtree(workdir, ignore_errors=True)
    sys.modules.pop("config_config", None)  # as which config files are loaded, one into the other
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", newline="") for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = launch.main(
                ["launch.py", f"--workdir={workdir}", f"--config={config}", *arguments]
            )
        except Begun:
            return None
    err.flush()
    line = err.buffer.getvalue().decode()
    assert status == 2
    assert line.startswith("error: ")
    assert line.endswith("\n")
    assert len(line.splitlines()) == 1
    assert len(line) < 1100
    assert not workdir.exists()
    return line


def wrong_values(name):
    """Values of a key that are wrong by construction, as typed."""
    default, last = KEYS[name], name.rpartition(".")[2]
    wrong = [*WRONG.get(name, ()), *WRONG.get(last, ())]
    if isinstance(default, bool):
        wrong += NO_BOOL
    elif isinstance(default, int):
        wrong += NO_INT if name in ZERO_TOO else ["0", *NO_INT]
    elif isinstance(default, float):
        wrong += NO_FLOAT
    drawn = st.nothing() if not wrong else st.sampled_from(wrong)
    if name in NAMES:
        known = {part.strip() for choice in NAMES[name] for part in choice.split(",")}
        letters = st.characters(blacklist_characters="\0,", blacklist_categories=["Cs"])
        drawn |= st.text(letters, min_size=1).filter(lambda x: x.strip() not in known | {""})
    return drawn


def right_values(name):
    """Values of a key that any config could have."""
    default = KEYS[name]
    if name in NAMES:
        return st.sampled_from(NAMES[name])
    if isinstance(default, bool):
        return st.sampled_from(["true", "false", "True", "0", "1"])
    if isinstance(default, int):
        return st.integers(0 if name in ZERO_TOO else 1, 100).map(str)
    if isinstance(default, float):
        return st.one_of(st.floats(0.01, 0.99).map(repr), st.sampled_from(["1e-3", ".5"]))
    return st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]))


def typed(name, value):
    return f"--config.{name}={value}"


MISTAKEN = [name for name in sorted(KEYS) if not wrong_values(name).is_empty]


def mistake(name):
    return wrong_values(name).map(lambda value: (name, value))


@given(st.lists(st.sampled_from(MISTAKEN).flatmap(mistake), min_size=1, max_size=3))
@once(max_examples=700)
def test_wrong_values_are_named_by_their_key(workdir, mistakes):
    line = run(workdir, *(typed(name, value) for name, value in mistakes))
    assert line is not None, mistakes
    assert any(name.rpartition(".")[2] in line for name, _ in mistakes), line


@st.composite
def right_settings(draw):
    """Settings that go together: what divides what is drawn as one."""
    names = st.sampled_from(sorted(KEYS.keys() - COUPLED.keys()))
    chosen = draw(st.lists(names, unique=True, min_size=1, max_size=6))
    found = {name: draw(right_values(name)) for name in chosen}
    for section in ("pretrain", "finetune"):
        parts = draw(st.integers(1, 8))
        found[f"{section}.num_microbatches"] = parts
        found[f"{section}.batch_size"] = parts * draw(st.integers(1, 50))
    found["pretrain.inputs_length"] = draw(st.integers(4, 1809))
    found["model.vocab_size"] = draw(st.integers(454, 10**5))
    N = found["model.num_heads"] = draw(st.integers(1, 48))
    divisors = st.sampled_from([K for K in range(1, N + 1) if N % K == 0])
    for name in conversion.ATTENTIONS:
        found[f"convert.num_kv_heads_{name}"] = draw(divisors)
    if "convert.per_layer_budget" in found:
        found["convert.grouping"] = "contiguous"
    return found


COUPLED = {name: None for name in KEYS if name.endswith(("batch_size", "num_microbatches"))}
COUPLED |= dict.fromkeys(["pretrain.inputs_length", "model.vocab_size", "model.num_heads"])
COUPLED |= {name: None for name in KEYS if ".num_kv_heads_" in name}


@given(right_settings())
@once(max_examples=150)
def test_every_right_config_begins(workdir, found):
    line = run(workdir, *(typed(name, value) for name, value in found.items()))
    assert line is None


@given(right_settings(), st.sampled_from(MISTAKEN).flatmap(mistake), st.randoms())
@once(max_examples=150)
def test_a_mistake_among_right_settings_is_named(workdir, found, wrong, random):
    """The names of what the mistake has to divide or be divided by are as good."""
    arguments = [typed(name, value) for name, value in (found | dict([wrong])).items()]
    random.shuffle(arguments)
    line = run(workdir, *arguments)
    if wrong[0] in COUPLED:  # 3 may well be right with what else was drawn
        assert line is None or wrong[0].rpartition(".")[2] in line
    else:
        assert line is not None
        assert wrong[0].rpartition(".")[2] in line


NAMED_FLAGS = {
    "--config.model={}": "config.model",
    "--config.model={'d_model': 4}": "config.model",
    "--config.evaluate=beam": "config.evaluate",
    "--config.model.d_model.x=4": "d_model",
    "--config.model.keys=4": "keys",
    "--config.lock=4": "lock",
    "--config.__class__=4": "__class__",
    "--config.model[0]=4": "model",
    "--config.model['d_model']=x": "d_model",
    "--config..=4": "config.",
    "--config.=4": "config.",
    "--config.uptrain.alpha": "uptrain.alpha",
    "--noconfig.uptrain.alpha": "uptrain.alpha",
    "--config.finetune.tasks=files": "train",
    "--config.pretrain.task=files": "train",
    "--config.name=\udcff": "config.name",
    "--workdir=\udcff": "workdir",
    "--stage=a\nb": "stage",
    "--stage=": "stage",
    "--workdir": "workdir",
    "--nostage": "nostage",
    "--flagfile=no/where": "no/where",
    "--flagfile=/dev/null": "",
    "-": "-",
    "--": "",
    "": "''",
    "\n": "argument",
}


@pytest.mark.parametrize("flag", NAMED_FLAGS)
def test_a_wrong_flag_is_named(workdir, flag):
    line = run(workdir, flag)
    if NAMED_FLAGS[flag]:
        assert line is not None
        assert NAMED_FLAGS[flag] in line


LETTERS = "abcdefghijklmnopqrstuvwxyz_ABCXYZ0189"


@given(st.sampled_from(sorted(KEYS)), st.text(LETTERS, max_size=3), st.integers(0, 40), st.data())
@once(max_examples=150)
def test_a_mistyped_key_is_named(workdir, name, typo, place, data):
    section, _, key = name.rpartition(".")
    typed_key = key[:place] + typo + key[place + data.draw(st.integers(0, 2)) :]
    mistyped = f"{section}.{typed_key}" if section else typed_key
    if mistyped in KEYS or mistyped in SECTIONS:
        return
    line = run(workdir, f"--config.{mistyped}=1")
    assert line is not None
    assert typed_key in line


ODD = st.text(st.characters(blacklist_characters="\0"), max_size=12)


@given(ODD, ODD)
@once(max_examples=100)
def test_any_odd_argument_is_refused_in_one_line_or_means_something(workdir, left, right):
    for argument in (f"--config.{left}={right}", f"--{left}", left, f"--config.{left}"):
        run(workdir, argument)


CONFIGS = {
    "configs/gqa.py:kv_heads=0": "kv_heads",
    "configs/gqa.py:kv_heads=-1": "kv_heads",
    "configs/gqa.py:kv_heads=5": "kv_heads",
    "configs/gqa.py:kv_heads=4.0": "kv_heads",
    "configs/gqa.py:kv_heads=²": "kv_heads",
    f"configs/gqa.py:kv_heads={'9' * 5000}": "kv_heads",
    "configs/gqa.py:kv_heads=": "kv_heads",
    "configs/gqa.py:size=": "size",
    "configs/gqa.py:size=huge,kv_heads=2": "size",
    "configs/gqa.py:nano,colour=red": "colour",
    "configs/gqa.py:=": "'='",
    "configs/gqa8.py:nano:mini": "nano:mini",
    "configs/gqa8.py:base": "num_kv_heads_self_attention=8",
    "README.md": "README.md",
    "LICENSE": "LICENSE",
    "configs": "configs",
    "/dev/null": "get_config",
    "launch.py": "get_config",
    "no.py": "no.py",
    ":": "",
    "": "config",
}


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_a_wrong_config_is_named(workdir, config):
    line = run(workdir, config=config)
    assert line is not None
    assert CONFIGS[config] in line


@given(ODD)
@once(max_examples=100)
def test_any_odd_config_argument_is_refused(workdir, argument):
    line = run(workdir, config=f"configs/gqa.py:{argument}")
    assert line is not None or {*argument.split(",")} <= {"", *SIZES}

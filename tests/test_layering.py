"""The import order is one-way, code stays small and old enough, and requirements are complete."""

import ast
import graphlib
import importlib.metadata
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from gqa.data.corpus_packages import DEFAULT_PACKAGES

ROOT = Path(__file__).parent.parent
# Each may import itself and what follows it.
LAYERS = ("tests", "configs", "launch", "experiments", "gqa")
# The packages of the pipeline and of the library, likewise: imports point down these lists.
PACKAGES = {
    "experiments": (*("aot", "speed", "pipeline", "run", "report", "graph", "stages", "workdir"),),
    "gqa": (
        *(
            "evaluation",
            "decoder_only",
            "kv_cache",
            "inference",
            "conversion",
            "training",
            "interop",
        ),
        *("checkpoints", "data", "model", "aot", "runtime"),
    ),
}
STAGES = ("pretrain", "convert", "uptrain", "finetune", "evaluate", "benchmark")
# Who may import it, as a pattern over module names.
ROOMS = {
    "huggingface_hub": r"gqa\.interop\.hub|tests\..*",
    "ml_collections": r"(configs|experiments|tests)\..*|launch",
    "pyarrow": r"gqa\.(data\.(array_records|columnar_files|parquet_pages|text_lines)"
    r"|checkpoints\.(ocdbt_nodes|stored_arrays))"
    r"|tests\..*",
    "tensorflow_datasets": r"gqa\.data\.tfds|tests\..*",
    "orbax": r"gqa\.checkpoints\.checkpoint|tests\..*",
    "safetensors": r"gqa\.interop\.safetensors_files|tests\..*",
    "submitit": r"experiments\.run\.slurm",
    "tensorboardX": r"gqa\.training\.tensorboard",
    "tensorflow": r"nobody",
    "tensorstore": r"gqa\.(checkpoints\.(pieces|stored_arrays)|interop\.t5x)|tests\..*",
    "wandb": r"gqa\.training\.progress|tests\..*",
    "torch": r"experiments\.speed\.peers|gqa\.interop\.huggingface\.modeling_t5_gqa"
    r"|tests\..*",
    "transformers": r"experiments\.speed\.peers|gqa\.interop\.huggingface\.modeling_t5_gqa"
    r"|tests\..*",
    "ctranslate2": r"experiments\.speed\.peers|gqa\.interop\.ctranslate2_folders|tests\..*",
}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    module_name(path): path.read_text(encoding="utf-8")
    for pattern in ("*.py", *(f"{layer}/**/*.py" for layer in LAYERS))
    for path in sorted(ROOT.glob(pattern))
}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}


def imports(tree):
    """Every module that a file imports, inside functions too; relative ones begin with a dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names = {f"{module}.{alias.name}" for alias in node.names}
            submodules = names & TREES.keys()
            yield from submodules
            if submodules != names:
                yield module


IMPORTS = {name: set(imports(tree)) for name, tree in TREES.items()}


def importers(package):
    """The modules that import a package or anything in it."""
    return {
        name
        for name, imported in IMPORTS.items()
        if any(i == package or i.startswith(f"{package}.") for i in imported)
    }


def test_imports_are_absolute():
    assert "pathlib" in IMPORTS["tests.test_layering"]
    assert [name for name in TREES if any(i.startswith(".") for i in IMPORTS[name])] == []


def test_layers_import_only_downwards():
    rank = {n: LAYERS.index(n.split(".")[0]) for n in TREES if n.split(".")[0] in LAYERS}
    assert {"gqa.model.attention", "experiments.pipeline", "tests.test_layering"} <= rank.keys()
    pairs = [(a, b) for a in rank for b in IMPORTS[a] & rank.keys()]
    assert [(a, b) for a, b in pairs if rank[b] < rank[a]] == []


@pytest.mark.parametrize("layer", PACKAGES)
def test_packages_import_only_downwards(layer):
    """Every module belongs to a package of the list, and imports none above its own."""
    order = PACKAGES[layer]
    inside = {name: name.split(".")[1] for name in TREES if name.startswith(f"{layer}.")}
    assert set(inside.values()) - {"__main__"} == set(order)
    rank = {name: order.index(package) for name, package in inside.items() if package in order}
    pairs = [(a, b) for a in rank for b in IMPORTS[a] & rank.keys()]
    assert [(a, b) for a, b in pairs if rank[b] < rank[a]] == []


def test_stages_meet_only_on_disk():
    for stage in STAGES:
        users = {u for u in importers(f"experiments.stages.{stage}") if not u.startswith("tests.")}
        assert users == set(), stage


def test_no_import_cycles():
    order = list(graphlib.TopologicalSorter(IMPORTS).static_order())  # raises CycleError
    assert order.index("gqa.model.attention") < order.index("gqa.model.transformer")


@pytest.mark.parametrize("package", ROOMS)
def test_third_parties_stay_in_their_rooms(package):
    users = importers(package)
    assert [user for user in users if not re.fullmatch(ROOMS[package], user)] == []


def test_functions_are_short():
    functions = [
        (name, node.name, node.end_lineno - node.lineno + 1)
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert [function for function in functions if function[-1] > 60] == []


def test_files_are_short():
    assert [name for name, source in SOURCES.items() if source.count("\n") > 400] == []


def test_sources_parse_on_the_oldest_python():
    for name, source in SOURCES.items():
        ast.parse(source, filename=name, feature_version=(3, 11))


def pins(file):
    """The names that a requirements file pins, following its `-r` lines."""
    for line in file.read_text().splitlines():
        if line.startswith("-r "):
            yield from pins(file.parent / line.removeprefix("-r "))
        elif line and not line.startswith("#"):
            pin = re.fullmatch(r"([\w.-]+)(\[[\w,-]+\])?==\d[\w.+]*", line)
            assert pin, f"{file.name}: {line!r} is not name==version"
            yield canonicalize_name(pin[1])


@pytest.mark.parametrize("file", ["requirements-test.txt", ".ci/requirements.txt"])
def test_every_line_pins_one_package_once(file):
    names = list(pins(ROOT / file))
    assert {"jax", "pytest"} <= set(names)
    assert len(names) == len(set(names))


def test_peers_are_installed_beside_what_runs():
    """Neither file pins what the other does, so that installing both changes no version."""
    peers = set(pins(ROOT / "requirements-bench.txt"))
    assert {"torch", "transformers", "ctranslate2"} <= peers
    assert not peers & set(pins(ROOT / "requirements.txt"))


def test_every_package_of_the_default_corpus_is_pinned():
    """The text, and with it every score, depends on the versions of these packages."""
    names = [canonicalize_name(name) for name in DEFAULT_PACKAGES]
    assert len(names) == len(set(names)) == 80
    assert set(names) <= set(pins(ROOT / "requirements.txt"))


@pytest.mark.parametrize("file", ["requirements.txt", "requirements-test.txt"])
def test_what_a_pinned_package_needs_is_pinned(file):
    pinned = set(pins(ROOT / file))
    wanted = [(name, "") for name in pinned]
    seen = set(wanted)
    while wanted:
        name, extra = wanted.pop()
        for line in importlib.metadata.requires(name) or ():
            need = Requirement(line)
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                assert canonicalize_name(need.name) in pinned, f"{name} needs {line}"
                found = {(canonicalize_name(need.name), e) for e in ("", *need.extras)} - seen
                wanted += found
                seen |= found

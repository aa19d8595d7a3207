"""pyproject.toml and the requirements files agree, and what the sources import is declared."""

import ast
import importlib.metadata
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# The requirements file with the exact version of what each extra names. cuda and tpu have none: the
# comment at jax in requirements.txt says what to change.
FILES = {
    "aot": "requirements-aot.txt",
    "bench": "requirements-bench.txt",
    "slurm": "requirements-slurm.txt",
    "test": "requirements-test.txt",
    "wandb": ".ci/requirements.txt",
}


def pinned_versions(file):
    """Version of each package that a requirements file pins."""
    lines = [line for line in (ROOT / file).read_text().splitlines() if "==" in line[:60]]
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}


def check_ranges(dependencies, file):
    versions = pinned_versions(file)
    for dependency in map(Requirement, dependencies):
        version = versions[canonicalize_name(dependency.name)]
        assert dependency.specifier.contains(version), f"{file} pins {version}, not {dependency}"


def test_the_pinned_versions_are_in_the_ranges():
    check_ranges(PROJECT["dependencies"], "requirements.txt")


@pytest.mark.parametrize("extra", FILES)
def test_the_pinned_versions_of_an_extra_are_in_its_ranges(extra):
    check_ranges(EXTRAS[extra], FILES[extra])


def test_extras_for_accelerators_take_the_same_jax():
    (jax,) = [line for line in PROJECT["dependencies"] if Requirement(line).name == "jax"]
    for extra in ("cuda", "tpu"):
        (requirement,) = map(Requirement, EXTRAS[extra])
        assert (requirement.name, requirement.specifier) == ("jax", Requirement(jax).specifier)


def test_dev_adds_the_linter_and_the_type_checker_to_test():
    names = {Requirement(line).name for line in EXTRAS["dev"]}
    assert names == {"gqa", "mypy", "ruff"}
    versions = [line for line in EXTRAS["dev"] if not line.startswith("gqa")]
    check_ranges(versions, "requirements-test.txt")


def test_every_import_is_declared():
    """What gqa and experiments import is a dependency, or what an extra names."""
    packages = importlib.metadata.packages_distributions()
    declared = [*PROJECT["dependencies"], *EXTRAS["bench"], *EXTRAS["slurm"], *EXTRAS["wandb"]]
    names = {canonicalize_name(Requirement(line).name) for line in declared}
    own = {"gqa", "experiments", "configs", "launch"}
    for path in [ROOT / "launch.py", *ROOT.glob("gqa/**/*.py"), *ROOT.glob("experiments/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            for module in {module.split(".")[0] for module in modules} - own:
                if module in sys.stdlib_module_names or module not in packages:
                    continue
                owners = {canonicalize_name(name) for name in packages[module]}
                assert owners & names, f"{path.relative_to(ROOT)} imports {module}"


def test_python_3_11_and_every_newer_one_is_accepted():
    accepted = SpecifierSet(PROJECT["requires-python"])
    assert [f"3.{minor}" for minor in range(9, 20) if accepted.contains(f"3.{minor}")] == [
        f"3.{minor}" for minor in range(11, 20)
    ]


def test_the_slow_tests_exist():
    lines = (ROOT / "tests" / "slow.txt").read_text().splitlines()
    for line in [line for line in lines if line and not line.startswith("#")]:
        file, _, test = line.partition("::")
        assert not test or f"def {test}(" in (ROOT / file).read_text(), line
        assert (ROOT / file).is_file(), line

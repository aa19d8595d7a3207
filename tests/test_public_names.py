"""What `import gqa` offers, and what importing it costs."""

import subprocess
import sys
from pathlib import Path

import pytest

import gqa

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", gqa.__all__)
def test_each_public_name_is_there(name):
    assert callable(getattr(gqa, name))
    assert name in dir(gqa)


def test_an_unknown_name_is_refused():
    with pytest.raises(AttributeError, match="'gqa' has no attribute 'konvert'"):
        gqa.konvert  # noqa: B018


def test_convert_stays_a_function_when_submodules_are_imported(tiny, random_params):
    """A submodule named like a function would take the function's place once it is imported."""
    import gqa.conversion
    import gqa.decoder_only.convert

    converted = gqa.convert(random_params(tiny), tiny, 2, "mean")
    assert converted.config.num_kv_heads_self_attention == 2
    assert converted.params.keys() == random_params(tiny).keys()


def test_importing_gqa_loads_neither_jax_nor_numpy():
    script = "import sys, gqa; print(sorted({'jax', 'flax', 'numpy'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"

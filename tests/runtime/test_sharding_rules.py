"""The rules by which arrays are split, without devices: what divides, and what is refused."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from gqa.aot import chips
from gqa.runtime import sharding
from gqa.runtime.errors import UserError
from gqa.runtime.mesh import (
    Layout,
    by_rows,
    bytes_moved,
    check_batch,
    check_rows,
    divisors,
    resolve_layout,
)

MESH = jax.sharding.AbstractMesh((2, 4), ("data", "model"))
SLICES = jax.sharding.AbstractMesh((3, 2, 4), ("slice", "data", "model"))


@pytest.fixture
def config(tiny):
    heads = {"num_kv_heads_self_attention": 1, "num_kv_heads_cross_attention": 2}
    return dataclasses.replace(tiny, num_heads=8, num_kv_heads_encoder=8, **heads)


@pytest.mark.parametrize(
    ("axis", "size", "mesh", "expected"),
    [
        ("heads", 8, MESH, ("model",)),
        ("heads", 4, MESH, ("model",)),
        ("heads", 6, MESH, None),  # 4 devices do not divide 6 heads
        ("heads", 2, MESH, None),
        ("batch", 6, MESH, ("data",)),
        ("batch", 5, MESH, None),
        ("batch", 12, SLICES, ("slice", "data")),
        ("batch", 4, SLICES, None),
        ("rows", 16, MESH, ("data", "model")),
        ("rows", 12, MESH, None),
        ("head_dim", 8, MESH, None),
        (None, 8, MESH, None),
        ("vocab", 8, jax.sharding.AbstractMesh((8, 1), ("data", "model")), None),
    ],
)
def test_an_axis_is_split_where_the_devices_divide_it(axis, size, mesh, expected):
    assert sharding._entry(axis, size, mesh) == expected


def test_a_batch_is_split_evenly_over_devices_and_microbatches():
    """8 devices in pairs along "model", 3 microbatches: 4 parts, a unit of 12 rows."""
    layout = Layout(model=2)
    for rows in (12, 24, 120):
        check_batch(rows, 3, layout, 8)
    for rows in (0, -12, 4, 6, 8, 13, 18):
        with pytest.raises(UserError, match=f"^batch_size={rows} .* a multiple of 12$"):
            check_batch(rows, 3, layout, 8)
    check_batch(8, 1, Layout(), 8)
    with pytest.raises(UserError, match=r"over 8 devices .* and 1 microbatches"):
        check_batch(4, 1, Layout(), 8)


@pytest.mark.parametrize(
    ("batch_size", "inputs_length", "length", "expected"),
    [
        (16, 4096, 4096, "batch"),  # a long cache: each device reads its part of it
        (12, 4096, 4096, "replicate"),  # 8 devices do not divide the rows
        (4, 4096, 4096, "replicate"),
        (16, 1, 1, "replicate"),  # to send queries costs more than so short a cache
    ],
)
def test_the_way_that_moves_fewer_bytes_is_chosen(
    config, batch_size, inputs_length, length, expected
):
    mesh = SimpleNamespace(size=8)
    chosen = resolve_layout(config, Layout(model=8), mesh, batch_size, inputs_length, length)
    assert chosen == Layout(model=8, kv_heads=expected)
    for settled in ("replicate", "batch"):
        layout = Layout(model=8, kv_heads=settled)
        assert resolve_layout(config, layout, mesh, 12, 1, 1) is layout


def test_lengths_are_those_of_their_own_caches(config):
    """All heads for the inputs and one for the decoder: only the decoder's length matters."""
    config = dataclasses.replace(config, num_kv_heads_cross_attention=8)
    mesh, layout = SimpleNamespace(size=8), Layout(model=8)
    assert resolve_layout(config, layout, mesh, 16, 1, 4096).kv_heads == "batch"
    found = [bytes_moved(K, 8, config.head_dim, n, 8) for K, n in ((8, 100_000), (1, 1))]
    total = {way: sum(moved[way] for moved in found) for way in found[0]}
    assert total["replicate"] < total["batch"]
    assert resolve_layout(config, layout, mesh, 16, 100_000, 1).kv_heads == "replicate"


def test_bytes_of_more_heads_than_devices():
    moved = bytes_moved(4, 8, 16, 100, 2)
    assert moved["replicate"] == 2 * (2 * 2 * 100 * 16)  # keys and values of 2 heads, 2 bytes each
    assert moved["batch"] == moved["replicate"] + 2 * 2 * 4 * 16 / 2


def test_bytes_of_fewer_heads_than_devices():
    """A device has one head whole, or an eighth of the rows."""
    moved = bytes_moved(1, 64, 128, 2048, 8)
    assert moved["replicate"] == 2 * 2 * 2048 * 128
    assert moved["batch"] == moved["replicate"] / 8 + 2 * 2 * 8 * 128 * 7 / 8


@pytest.mark.parametrize(("batch_size", "fits"), [(8, True), (24, True), (4, False), (20, False)])
def test_rows_are_split_where_heads_are_fewer(config, batch_size, fits):
    layout = Layout(model=8, kv_heads="batch")
    check_rows(batch_size, config, Layout(model=8), 8)
    if fits:
        check_rows(batch_size, config, layout, 8)
        return
    with pytest.raises(UserError, match=f"^batch_size={batch_size} .* a multiple of 8,"):
        check_rows(batch_size, config, layout, 8)


def test_a_cache_is_split_by_rows_only_where_heads_are_fewer_and_it_was_chosen():
    assert not by_rows(8, Layout(model=4, kv_heads="batch"))
    assert not by_rows(4, Layout(model=4))
    assert by_rows(2, Layout(model=4, kv_heads="batch"))
    assert not by_rows(2, Layout(model=4, kv_heads="replicate"))
    with pytest.raises(ValueError, match="auto"):
        by_rows(2, Layout(model=4))


def test_a_leaf_without_a_mesh_is_left_as_it_is():
    x = np.ones((2, 3, 1, 4), np.float32)
    assert sharding.constrain(x, "batch", None, "heads", None) is x
    np.testing.assert_array_equal(sharding.repeat_heads(x), x)
    assert sharding.local_bytes(jax.ShapeDtypeStruct((3, 5), np.float16)) == 30


@pytest.mark.parametrize(("n", "expected"), [(1, [1]), (12, [1, 2, 3, 4, 6, 12]), (9, [1, 3, 9])])
def test_divisors(n, expected):
    assert divisors(n) == expected


def test_a_part_of_the_devices_has_the_largest_common_number():
    assert Layout(model=12, fsdp=True).within(8) == Layout(model=4, fsdp=True)
    assert Layout(model=2).within(8).model == 2


@pytest.mark.parametrize(
    ("name", "chip_count", "links", "backend"),
    [
        ("v4-8", 4, 2, "tpu"),
        ("v4-16", 8, 3, "tpu"),
        ("v4-32", 16, 4, "tpu"),
        ("v5e-4", 4, 2, "tpu"),
        ("v5e-8", 8, 3, "tpu"),
        ("v6e-256", 256, 4, "tpu"),
        ("h100-1", 1, 1, "cudnn"),
        ("h100-8", 8, 1, "cudnn"),
    ],
)
def test_slices_by_hand(name, chip_count, links, backend):
    """Each axis of 2 is one link of a chip, each longer one two; cores count in v4's names."""
    target = chips.find(name)
    assert (target.chips, target.links, target.backend) == (chip_count, links, backend)
    assert target.platform == ("tpu" if backend == "tpu" else "gpu")

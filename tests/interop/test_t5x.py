"""T5X checkpoints, written here with TensorStore as T5X does, become the parameters they hold."""

import dataclasses
import math
import os
import zlib

import jax
import numpy as np
import pytest
import tensorstore
from flax.traverse_util import flatten_dict

from gqa.checkpoints import checkpoint, pieces, stored_arrays
from gqa.interop import t5x
from gqa.model.activations import RELU
from gqa.runtime.errors import CheckpointError, UserError
from tests.support import memory

NAMES = {
    "attention_norm": "pre_attention_layer_norm",
    "self_attention_norm": "pre_self_attention_layer_norm",
    "cross_attention_norm": "pre_cross_attention_layer_norm",
    "mlp_norm": "pre_mlp_layer_norm",
    "cross_attention": "encoder_decoder_attention",
}


def their_arrays(params, config, scanned=None, flat=True):
    """T5X's arrays by name: `scanned` names the folder of scanned layers, if any."""
    arrays = {
        "token_embedder.embedding": params["embedding"],
        "encoder.encoder_norm.scale": params["encoder"]["norm"]["scale"],
        "decoder.decoder_norm.scale": params["decoder"]["norm"]["scale"],
    }
    if "logits" in params:
        arrays["decoder.logits_dense.kernel"] = params["logits"]
    for stack in ("encoder", "decoder"):
        arrays[f"{stack}.relpos_bias.rel_embedding"] = params[stack]["position_bias"]["table"].T
        for path, leaf in flatten_dict(params[stack]["layers"]).items():
            module, name = path
            module = NAMES.get(module, module)
            name = name if name == "scale" else f"{name}.kernel"
            if config.activation == RELU:
                name = name.replace("wi_0", "wi")
            layers = [np.asarray(x) for x in leaf]
            if flat and name.split(".")[0] in ("query", "key", "value"):
                layers = [x.reshape(len(x), -1) for x in layers]
            elif flat and name == "out.kernel":
                layers = [x.reshape(-1, x.shape[-1]) for x in layers]
            if scanned:
                where = scanned.format(stack)
                arrays[f"{stack}.{where}.{module}.{name}"] = np.stack(layers, 1)
            else:
                for i, x in enumerate(layers):
                    arrays[f"{stack}.layers_{i}.{module}.{name}"] = x
    return {name: np.asarray(x) for name, x in arrays.items()}


def write(folder, arrays, ocdbt=False, dtype="float32"):
    """Each array in chunks, compressed by gzip, as T5X writes it; beside it what is not read."""
    folder.mkdir(parents=True)
    for name, x in (arrays | {"!state.param_states.decoder.v": np.zeros((2, 2))}).items():
        name = name[1:] if name.startswith("!") else f"target.{name}"
        store = {"driver": "file", "path": f"{folder}/{name}/"}
        if ocdbt:
            store = {"driver": "ocdbt", "base": f"file://{folder}/", "path": f"{name}/"}
        spec = {"driver": "zarr", "kvstore": store, "context": {"file_io_sync": False}}
        spec["metadata"] = {
            "shape": x.shape,
            "chunks": [max(1, math.ceil(n / 2)) for n in x.shape],
            "dtype": "<f4" if dtype == "float32" else dtype,
            "compressor": {"id": "gzip"},
        }
        tensorstore.open(spec, create=True).result().write(x.astype(dtype)).result()


@pytest.fixture
def network(tiny, random_params):
    config = dataclasses.replace(tiny, num_encoder_layers=3)
    return random_params(config), config


def check_equal(params, expected):
    jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize(
    ("scanned", "flat", "ocdbt"),
    [(None, True, False), (None, False, True), ("layers", False, False), ("{}", True, True)],
)
def test_a_checkpoint_is_read_in_each_layout(network, tmp_path, scanned, flat, ocdbt):
    params, config = network
    write(tmp_path / "checkpoint_900", {}, ocdbt)
    folder = tmp_path / "checkpoint_1000"
    folder = folder / "state" if ocdbt else folder
    write(folder, their_arrays(params, config, scanned, flat), ocdbt)
    source = t5x.open_folder(tmp_path)
    assert source.config == config
    check_equal(pieces.collect(source), params)


def test_t5_1_0_and_bfloat16_are_read(network, random_params, tmp_path):
    config = dataclasses.replace(network[1], activation=RELU, tied_logits=True)
    params = random_params(config)
    write(tmp_path / "a", their_arrays(params, config))
    assert t5x.open_folder(tmp_path / "a").config == config
    write(tmp_path / "b", their_arrays(params, config), dtype="bfloat16")
    source = t5x.open_folder(tmp_path / "b")
    check_equal(
        pieces.collect(source),
        jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), params),
    )


def test_a_checkpoint_of_ours_is_written_from_it(network, tmp_path):
    params, config = network
    write(tmp_path / "a", their_arrays(params, config, "layers", flat=False))
    with checkpoint.Checkpoints(tmp_path / "b") as checkpoints:
        checkpoints.write(1, t5x.open_folder(tmp_path / "a"), {"config": {}})
    check_equal(checkpoint.load(tmp_path / "b", {"params": params})["params"], params)


def test_a_position_bias_in_each_layer_must_be_the_same(network, tmp_path):
    params, config = network
    arrays = their_arrays(params, config, "layers")
    for stack in ("encoder", "decoder"):
        table = arrays.pop(f"{stack}.relpos_bias.rel_embedding")
        layers = getattr(config, f"num_{stack}_layers")
        name = f"{stack}.layers.relative_posemb.rel_embedding"
        arrays[name] = np.stack([table] * layers, 1)
    write(tmp_path / "a", arrays)
    check_equal(pieces.collect(t5x.open_folder(tmp_path / "a")), params)
    arrays[name][0, 1, 0] += 1
    write(tmp_path / "b", arrays)
    with pytest.raises(UserError, match=rf"b: array target\.{name} differs from layer to layer"):
        t5x.open_folder(tmp_path / "b")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("decoder.layers_1.mlp.wo.kernel", None, "is missing"),
        ("token_embedder.embedding", None, "is missing"),
        ("decoder.layers_1.self_attention.q_norm.scale", (3,), r"is not one of T5's \(1 in all\)"),
        ("decoder.layers_0.mlp.wo.kernel", (24, 17), r"has shape \(24, 17\), expected \(24, 16\)"),
    ],
)
def test_an_array_that_does_not_fit_is_named(network, tmp_path, name, shape, message):
    arrays = their_arrays(*network)
    arrays.pop(name, None)
    arrays |= {name: np.zeros(shape)} if shape else {}
    write(tmp_path / "a", arrays)
    with pytest.raises(UserError, match=rf"a: array target\.{name} {message}"):
        t5x.open_folder(tmp_path / "a")


@pytest.mark.parametrize("layer", [0, 1])
def test_a_whole_layer_that_is_missing_is_named(network, tmp_path, layer):
    arrays = their_arrays(*network)
    missing = f"encoder.layers_{layer}."
    arrays = {name: array for name, array in arrays.items() if not name.startswith(missing)}
    write(tmp_path / "a", arrays)
    with pytest.raises(CheckpointError, match=rf"array target\.encoder\.layers_{layer}\.\.\. is"):
        t5x.open_folder(tmp_path / "a")


def test_a_folder_of_something_else_is_told(tmp_path):
    with pytest.raises(UserError, match="no T5X checkpoint; it would have folders target"):
        t5x.open_folder(tmp_path)
    with pytest.raises(UserError, match=r"nothing: No such folder; name the folder"):
        t5x.open_folder(tmp_path / "nothing")


@pytest.mark.parametrize("scanned", [None, "{}"])
def test_sizes_are_told_apart_by_their_arrays(tiny, random_params, tmp_path, scanned):
    """KV heads of their own for each attention, other buckets than heads, unequal stacks."""
    config = dataclasses.replace(
        tiny,
        num_encoder_layers=3,
        num_kv_heads_encoder=4,
        num_kv_heads_self_attention=2,
        num_kv_heads_cross_attention=1,
        num_buckets=16,
        d_ff=40,
    )
    params = random_params(config)
    write(tmp_path / "a", their_arrays(params, config, scanned))
    source = t5x.open_folder(tmp_path / "a")
    assert source.config == config
    check_equal(pieces.collect(source), params)
    assert source.chunks["decoder/layers/mlp/wo"] == (1, 40, 16)
    assert source.chunks["embedding"] == (32, 16)


def test_a_bias_that_differs_in_an_unscanned_layer_is_named(network, tmp_path):
    params, config = network
    arrays = their_arrays(params, config)
    for stack in ("encoder", "decoder"):
        table = arrays.pop(f"{stack}.relpos_bias.rel_embedding")
        for i in range(getattr(config, f"num_{stack}_layers")):
            arrays[f"{stack}.layers_{i}.relpos_bias.rel_embedding"] = table.copy()
    write(tmp_path / "a", arrays)
    check_equal(pieces.collect(t5x.open_folder(tmp_path / "a")), params)
    arrays["encoder.layers_2.relpos_bias.rel_embedding"][0, 0] += 1
    write(tmp_path / "b", arrays)
    with pytest.raises(UserError, match=r"encoder.layers_0.relpos_bias.* differs from layer to"):
        t5x.open_folder(tmp_path / "b")


def test_the_last_step_is_that_of_the_largest_number(network, tmp_path):
    params, config = network
    write(tmp_path / "checkpoint_2000", their_arrays(params, config))
    (tmp_path / "checkpoint_10000.tmp").mkdir()  # no number: being written
    write(tmp_path / "checkpoint_300", {})
    check_equal(pieces.collect(t5x.open_folder(tmp_path)), params)


def test_numbers_that_are_not_finite_are_refused_by_array(network, tmp_path):
    for name, bad in (("decoder.layers_1.mlp.wo.kernel", np.nan), ("encoder.encoder_norm.scale",
                                                                 np.inf)):  # fmt: skip
        arrays = their_arrays(*network)
        arrays[name] = arrays[name].copy()
        arrays[name].flat[-1] = bad
        write(tmp_path / name, arrays)
        message = rf"{name}: array target\.{name} has NaN or infinite numbers"
        with pytest.raises(CheckpointError, match=message):
            pieces.collect(t5x.open_folder(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("decoder.layers_0.mlp.wo.kernel", lambda x: x.T, r"shape \(16, 24\), expected \(24, 16\)"),
        ("decoder.layers_0.mlp.wo.kernel", np.ravel, r"shape \(384,\), expected \(24, 16\)"),
        (
            "encoder.layers_0.attention.out.kernel",
            lambda x: x.reshape(x.shape[0] * 2, -1),
            r"has shape \(\d+, 8\), expected \(\d+, 16\) or \(4, \d+, 16\)",
        ),
        ("token_embedder.embedding", np.ravel, "not one of T5's"),
        ("decoder.relpos_bias.rel_embedding", np.ravel, "not one of T5's"),
    ],
)
def test_shapes_are_compared_and_not_numbers_of_elements(network, tmp_path, name, change, message):
    arrays = their_arrays(*network)
    write(tmp_path / "a", arrays | {name: change(arrays[name])})
    with pytest.raises(CheckpointError, match=rf"array target\.{name} has {message}|{message}"):
        t5x.open_folder(tmp_path / "a")


@pytest.mark.parametrize("dtype", ["<i4", "|b1", "<c8"])
def test_whole_numbers_are_no_weights(network, tmp_path, dtype):
    write(tmp_path / "a", their_arrays(*network), dtype=dtype)
    with pytest.raises(
        CheckpointError, match=r"array target\.\S+ has dtype \w+; use one of float32"
    ):
        t5x.open_folder(tmp_path / "a")


@pytest.mark.parametrize("ocdbt", [False, True])
def test_a_part_of_an_array_that_was_not_copied_is_no_zeros(network, tmp_path, ocdbt):
    write(tmp_path / "a", their_arrays(*network), ocdbt)
    name = "target.decoder.layers_0.mlp.wo.kernel"
    store = tensorstore.KvStore.open(stored_arrays.kvstore(tmp_path / "a")).result()
    store.write(f"{name}/1.0", None).result()
    source = t5x.open_folder(tmp_path / "a")
    with pytest.raises(CheckpointError, match=rf"a: array {name}: 1 of 4 chunks are missing"):
        pieces.collect(source)


def test_a_chunk_far_larger_than_its_array_is_refused_before_it_is_decoded(network, tmp_path):
    write(tmp_path / "a", their_arrays(*network))
    name = "target.decoder.layers_0.mlp.wo.kernel"
    compressor = zlib.compressobj(1, wbits=31)
    zeros = bytes(2**24)
    bomb = b"".join([compressor.compress(zeros) for _ in range(20)]) + compressor.flush()
    (tmp_path / "a" / name / "0.0").write_bytes(bomb)
    source = t5x.open_folder(tmp_path / "a")
    with (
        memory.peak() as used,
        pytest.raises(CheckpointError, match=f"array {name}: chunk 0.0 has"),
    ):
        pieces.collect(source)
    assert used.nbytes < 2**27


@pytest.mark.parametrize("layer", ["500000000", "9" * 9, "9" * 200])
def test_the_number_in_a_name_makes_no_layers(network, tmp_path, layer):
    arrays = their_arrays(*network)
    name = f"decoder.layers_{layer}.mlp.wo.kernel"
    write(tmp_path / "a", arrays | {name: np.zeros((24, 16))})
    with pytest.raises(CheckpointError, match=r"a: array target\.decoder\.layers_"):
        t5x.open_folder(tmp_path / "a")


def test_pipes_and_links_out_of_the_folder_are_refused(network, tmp_path):
    write(tmp_path / "a", their_arrays(*network))
    array = tmp_path / "a" / "target.decoder.layers_0.mlp.wo.kernel"
    for moved in (array / "0.0", array):
        moved.rename(tmp_path / "elsewhere")
        for make in (os.mkfifo, lambda path: path.symlink_to(tmp_path / "elsewhere")):
            make(moved)
            # An array that is a pipe has no files, so it is missing.
            message = f"{moved.name} is not a regular file of the folder|{moved.name} is missing"
            with pytest.raises(UserError, match=message):
                t5x.open_folder(tmp_path / "a")
            moved.unlink()
        (tmp_path / "elsewhere").rename(moved)
    check_equal(pieces.collect(t5x.open_folder(tmp_path / "a")), network[0])


def test_no_link_of_a_database_leads_out_of_its_folder(network, tmp_path):
    """Its files may lie in any subfolder, such as one that is a link."""
    write(tmp_path / "a", their_arrays(*network), ocdbt=True)
    for moved in (tmp_path / "a" / "d", tmp_path / "a" / "manifest.ocdbt"):
        # TensorStore would follow a link between folders, and Python lists nothing behind it.
        (tmp_path / "a" / "d" / "sub").symlink_to(tmp_path)
        with pytest.raises(UserError, match="d/sub is not a regular file of the folder"):
            t5x.open_folder(tmp_path / "a")
        (tmp_path / "a" / "d" / "sub").unlink()

        moved.rename(tmp_path / "elsewhere")
        moved.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(UserError, match=f"{moved.name} is not a regular file of the folder"):
            t5x.open_folder(tmp_path / "a")
        moved.unlink()
        (tmp_path / "elsewhere").rename(moved)
    check_equal(pieces.collect(t5x.open_folder(tmp_path / "a")), network[0])


def test_a_checkpoint_of_a_folder_is_no_link_out_of_it(network, tmp_path):
    write(tmp_path / "real", their_arrays(*network))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "checkpoint_1").symlink_to(tmp_path / "real")
    with pytest.raises(
        CheckpointError, match=r"a/checkpoint_1: is a link out of .*/a; name the fo"
    ):
        t5x.open_folder(tmp_path / "a")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    check_equal(pieces.collect(t5x.open_folder(tmp_path / "link")), network[0])


@pytest.mark.parametrize("name", ["a%20b", "a#b", "a?b c"])
@pytest.mark.parametrize("ocdbt", [False, True])
def test_a_folder_may_have_any_name(network, tmp_path, name, ocdbt):
    write(tmp_path / "a", their_arrays(*network), ocdbt)
    (tmp_path / "a").rename(tmp_path / name)
    check_equal(pieces.collect(t5x.open_folder(tmp_path / name)), network[0])


def test_the_files_are_those_of_the_parameters(network, tmp_path):
    write(tmp_path / "a", their_arrays(*network))
    (tmp_path / "a" / "README.md").write_text("x")
    files = {path.relative_to(tmp_path / "a").as_posix() for path in t5x.open_folder(tmp_path / "a")
             .files}  # fmt: skip
    assert "target.encoder.encoder_norm.scale/.zarray" in files
    assert "target.encoder.encoder_norm.scale/0" in files
    assert {name.split(".")[0] for name in files} == {"target"}
    write(tmp_path / "b", their_arrays(*network), ocdbt=True)
    names = {path.name for path in t5x.open_folder(tmp_path / "b").files}
    assert "manifest.ocdbt" in names
    assert len(names) > 1

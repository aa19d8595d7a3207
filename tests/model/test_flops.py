import dataclasses
import math

import jax
import jax.extend.core
import jax.numpy as jnp
import pytest

from gqa.model import transformer
from gqa.model.flops import forward_flops, train_flops
from gqa.training import loss

VARIANTS = {
    "mha": {},
    "gqa": {"num_kv_heads_self_attention": 2, "num_kv_heads_cross_attention": 1},
    "mqa": {
        f"num_kv_heads_{where}": 1 for where in ("encoder", "self_attention", "cross_attention")
    },
    "t5_1_0": {"activation": "relu", "tied_logits": True},
    "depths": {"num_encoder_layers": 3, "num_decoder_layers": 1},
}
B, S, T = 3, 10, 7


def product_flops(jaxpr) -> int:
    """FLOPs of all products of matrices; those in a loop's body as often as it runs.

    A product with a vector is a sum, of the position bias's gradient over the batch.
    """
    total = 0
    for eqn in jaxpr.eqns:
        is_product = eqn.primitive.name == "dot_general"
        if is_product and min(var.aval.ndim for var in eqn.invars) > 1:
            contracted = eqn.params["dimension_numbers"][0][0]
            shape = eqn.invars[0].aval.shape
            total += 2 * eqn.outvars[0].aval.size * math.prod(shape[i] for i in contracted)
        assert eqn.primitive.name != "while", "how often it runs is not known"
        repeats = eqn.params.get("length", 1)
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            total += repeats * product_flops(inner)
    return total


def traced_flops(config, differentiate):
    def forward(params, batch):
        logits = transformer.Transformer(config).apply({"params": params}, batch)
        return loss.cross_entropy(logits, batch["targets"])["loss"]

    params = jax.eval_shape(lambda: transformer.init_params(config, 0))
    batch = {
        "inputs": jax.ShapeDtypeStruct((B, S), jnp.int32),
        "targets": jax.ShapeDtypeStruct((B, T), jnp.int32),
    }
    function = jax.grad(forward) if differentiate else forward
    return product_flops(jax.make_jaxpr(function)(params, batch).jaxpr)


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_flops_are_the_products_of_the_network(tiny, variant):
    config = dataclasses.replace(tiny, **VARIANTS[variant])
    assert forward_flops(config, B, S, T) == traced_flops(config, differentiate=False)


@pytest.mark.parametrize("variant", ["gqa", "t5_1_0"])
def test_train_flops_are_the_products_of_the_gradient(tiny, variant):
    config = dataclasses.replace(tiny, **VARIANTS[variant])
    assert train_flops(config, B, S, T) == traced_flops(config, differentiate=True)


def test_what_is_computed_twice_counts_once(tiny):
    config = dataclasses.replace(tiny, remat="full")
    assert train_flops(config, B, S, T) == train_flops(tiny, B, S, T)
    assert traced_flops(config, differentiate=True) > train_flops(config, B, S, T)

"""Token losses as sums, so that microbatches and devices add up before anything is divided."""

import jax
import jax.numpy as jnp
from jax import Array


def cross_entropy(logits: Array, targets: Array, z_loss: float = 0.0) -> dict[str, Array]:
    """Sums over the real tokens (targets [B, T] > 0) of float32 logits [B, T, V].

    Returns loss (cross entropy plus z_loss * log(Z)^2, T5's regulariser), nats (cross entropy
    alone), correct (arg max is the target) and tokens, all scalars.
    """
    log_z = jax.nn.logsumexp(logits, axis=-1)
    # A masked sum instead of a gather: its gradient joins the softmax's in one pass.
    is_target = jnp.arange(logits.shape[-1])[None, None] == targets[..., None]
    target_logits = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    real = (targets > 0).astype(jnp.float32)
    nats = (log_z - target_logits) * real
    return {
        "loss": jnp.sum(nats + z_loss * jnp.square(log_z) * real),
        "nats": jnp.sum(nats),
        "correct": jnp.sum((target_logits >= logits.max(-1)) * real),
        "tokens": jnp.sum(real),
    }


def kl_divergence(teacher: Array, logits: Array, targets: Array) -> Array:
    """Sum over the real tokens of KL(teacher || logits) in nats; logits [B, T, V] of both."""
    given, own = (jax.nn.log_softmax(x.astype(jnp.float32), axis=-1) for x in (teacher, logits))
    per_token = jnp.sum(jnp.exp(given) * (given - own), axis=-1)
    return jnp.sum(per_token * (targets > 0))

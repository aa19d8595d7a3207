"""Token losses as sums, so that microbatches and devices add up before anything is divided."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"], z_loss: float = 0.0
) -> dict[str, Float[Array, ""]]:
    """Return sums over the real tokens, whose targets are greater than 0; logits are float32.

    The sums are loss (cross entropy plus z_loss * log(Z)^2, T5's regulariser), nats (cross entropy
    alone), correct (the number of tokens whose arg max is the target) and tokens (their number).
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


def kl_divergence(
    teacher: Float[Array, "B T V"], logits: Float[Array, "B T V"], targets: Int[Array, "B T"]
) -> Float[Array, ""]:
    """Return the sum over the real tokens of KL(teacher || logits), in nats."""
    log_teacher, log_student = (
        jax.nn.log_softmax(x.astype(jnp.float32), axis=-1) for x in (teacher, logits)
    )
    per_token = jnp.sum(jnp.exp(log_teacher) * (log_teacher - log_student), axis=-1)
    return jnp.sum(per_token * (targets > 0))

"""Losses of the predicted tokens, as sums over a batch and not as means.

Sums of microbatches and of devices can be added; `training_step.py` then divides by the number of
real tokens in the whole batch. A mean of means would depend on how a batch is cut. Letters are
those of `gqa/model/attention.py`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"], z_loss: float = 0.0, pad: int = 0
) -> dict[str, Float[Array, ""]]:
    """Return sums over the real tokens of a batch; the target `pad` is none and does not count.

    Args:
        logits: float32.
        z_loss: weight of T5's regulariser, which keeps log Z near 0: z_loss * log(Z)^2, where Z is
            the sum of the exponentials of a token's logits.

    Returns:
        loss: cross entropy plus regulariser, in nats. nats: cross entropy alone. correct: how many
        targets have the largest logit. tokens: how many targets are real.
    """
    log_z = jax.nn.logsumexp(logits, axis=-1)

    # Pick each target's logit by a masked sum. The gradient of a gather would be a scatter, which
    # is a pass over [B, T, V] of its own; that of the sum is fused with the gradient of the
    # softmax.
    is_target = jnp.arange(logits.shape[-1])[None, None] == targets[..., None]
    target_logits = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)

    real = (targets != pad).astype(jnp.float32)
    nats = (log_z - target_logits) * real
    return {
        "loss": jnp.sum(nats + z_loss * jnp.square(log_z) * real),
        "nats": jnp.sum(nats),
        "correct": jnp.sum((target_logits >= logits.max(-1)) * real),
        "tokens": jnp.sum(real),
    }


def kl_divergence(
    teacher: Float[Array, "B T V"],
    logits: Float[Array, "B T V"],
    targets: Int[Array, "B T"],
    pad: int = 0,
) -> Float[Array, ""]:
    """Return the sum over the real tokens of KL(teacher || logits), in nats.

    Args:
        teacher, logits: unnormalised log-probabilities of the two networks.
        targets: `pad` where a position is padding.
    """
    log_teacher, log_student = (
        jax.nn.log_softmax(x.astype(jnp.float32), axis=-1) for x in (teacher, logits)
    )
    per_token = jnp.sum(jnp.exp(log_teacher) * (log_teacher - log_student), axis=-1)
    return jnp.sum(per_token * (targets != pad))

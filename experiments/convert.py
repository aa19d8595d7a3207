"""Convert a pretrained checkpoint to fewer KV heads (paper, section 2.1); no training."""

from pathlib import Path

import jax

from experiments.stage import Job, Outcome, load_state, open_parent, record
from experiments.text import training
from gqa import checkpoint, convert, optim, train


def run(name: str, settings: dict, folder: Path, parents: list[Path], job: Job) -> Outcome:
    """Settings: num_kv_heads for each attention, method, optimizer, seed and variant."""
    parent = open_parent(parents[0])
    state, data_state = load_state(parent, job)
    params, config = convert.convert(
        state.params, parent.config, settings["num_kv_heads"], settings["method"], settings["seed"]
    )
    opt_state = optim.convert_state(state.opt_state, state.params, params, settings["optimizer"])
    before, after = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (state.params, params))
    print(f"{name}: {before:,} -> {after:,} parameters, optimizer state: {settings['optimizer']}")

    recipe = parent.info["recipe"]
    data = training(job.text, recipe["task"], recipe, recipe["seed"])
    loss = train.make_validation(config, job.mesh)(params, data.validation())
    print(f"{name}: validation loss {loss:.3f}")
    step = int(state.step)
    info = parent.info | {"model": config.__dict__, "variant": settings["variant"]}
    with checkpoint.Checkpoints(folder / "checkpoints") as checkpoints:
        if checkpoints.latest is None:  # else a run was killed between this and its last line
            items = {"params": params, "opt_state": opt_state, "data": data_state, "config": info}
            checkpoints.save(step, items, {"validation_loss": loss})
    return Outcome(
        [record("validation_loss", loss, "nats per token", n=data.validation_size)], str(step)
    )

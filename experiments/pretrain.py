"""Train the multi-head parent from scratch."""

from pathlib import Path

from experiments.stage import Job, Outcome, run_training
from experiments.text import training
from gqa import hardware, model, optim, train


def run(name: str, settings: dict, folder: Path, parents: list[Path], job: Job) -> Outcome:
    """Settings: the config's section pretrain, and model, seed and variant."""
    del parents  # there are none
    config = model.Config(**settings["model"] | {"dropout_rate": settings["dropout_rate"]})
    size = model.count_params(config)
    # Parameters and their gradients, in float32.
    hardware.check_memory(8 * size, f"training a network of {size:,} parameters")
    return run_training(
        name,
        job,
        folder,
        training(job.text, settings["task"], settings, settings["seed"]),
        start=lambda: train.init(config, settings["seed"]),
        config=config,
        info={"recipe": settings, "variant": settings["variant"]},
        recipe=settings,
        learning_rate=optim.rsqrt(settings["warmup"], settings["scale"]),
        steps=settings["steps"],
        keep="last",
    )

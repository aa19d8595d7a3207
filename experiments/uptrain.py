"""Continue pretraining a converted checkpoint for alpha times its steps (paper, section 2.1).

Recipe, learning-rate schedule, text and the place in it are the parent's, as if nothing had
happened but the conversion.
"""

from pathlib import Path

from experiments.stage import Job, Outcome, load_state, open_parent, run_training
from experiments.text import training
from gqa import optim
from gqa.train import State


def run(name: str, settings: dict, folder: Path, parents: list[Path], job: Job) -> Outcome:
    """Settings: alpha and variant."""
    parent = open_parent(parents[0])
    recipe = parent.info["recipe"]
    data = training(job.text, recipe["task"], recipe, recipe["seed"])

    def start() -> State:
        state, data_state = load_state(parent, job)
        data.batches.set_state(data_state)
        return state

    return run_training(
        name,
        job,
        folder,
        data,
        start=start,
        config=parent.config,
        info=parent.info | {"variant": settings["variant"]},
        recipe=recipe,
        learning_rate=optim.rsqrt(recipe["warmup"], recipe["scale"]),
        first_step=int(parent.path.name),
        steps=round(settings["alpha"] * recipe["steps"]),
        keep="last",
    )

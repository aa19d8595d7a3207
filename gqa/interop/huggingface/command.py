"""The command `python -m gqa export`: its arguments and what it does with them.

`gqa.interop.huggingface` writes the folder; `gqa/__main__.py` chooses among the commands.
"""

import argparse

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from gqa.checkpoints import checkpoint, pieces, step_folders
from gqa.data import tokenizer
from gqa.interop import huggingface
from gqa.model.config import Config
from gqa.runtime.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="the folder of a step, or the folder of all steps"
    )
    parser.add_argument("folder", metavar="FOLDER", help="where config.json and the weights go")
    parser.add_argument(
        "--expand",
        action="store_true",
        help="repeat each KV head for its query heads, so that Transformers' T5 can run the result",
    )
    parser.add_argument("--vocabulary", help="SentencePiece file to put beside the weights")


def run(options: argparse.Namespace) -> None:
    """Load the checkpoint and write it as a folder of Hugging Face."""
    path = step_folders.find(options.checkpoint)
    info = checkpoint.load_config(path)
    try:
        config = Config(**info["model"])
    except (KeyError, TypeError) as error:
        raise UserError(f"checkpoint {path}: its config has no network; use another") from error
    if options.vocabulary and tokenizer.load(options.vocabulary).hash != info.get("vocabulary"):
        raise UserError(f"{options.vocabulary} is not the vocabulary that {path} was trained with")
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)
        for name, shape in pieces.shapes(config).items()
    }
    params = checkpoint.load(path, {"params": unflatten_dict(shapes, sep="/")})["params"]
    huggingface.save(params, config, options.folder, options.expand, options.vocabulary)

"""Write a checkpoint of this program as a folder of Hugging Face.

python -m gqa.huggingface runs/stages/uptrain-KEY/checkpoints FOLDER --vocabulary=spiece.model
"""

import functools
import sys

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from gqa.checkpoints import checkpoint, pieces
from gqa.data import tokenizer
from gqa.interop import huggingface
from gqa.model.config import Config
from gqa.runtime import command_line
from gqa.runtime.errors import UserError


def main(argv: list[str]) -> None:
    """Parse, load and save."""
    parser = command_line.Parser(
        prog="python -m gqa.huggingface", description=__doc__.splitlines()[0]
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a step's folder or its parent")
    parser.add_argument("folder", metavar="FOLDER", help="where config.json and weights go")
    parser.add_argument(
        "--expand", action="store_true", help="repeat KV heads: what Transformers' T5 can run"
    )
    parser.add_argument("--vocabulary", help="its SentencePiece file, to be put beside")
    options = parser.parse_args(argv[1:])
    path = checkpoint.find(options.checkpoint)
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


if __name__ == "__main__":
    sys.exit(command_line.status(functools.partial(main, sys.argv)))

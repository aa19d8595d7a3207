"""The command `python -m gqa export`: its arguments and what it does with them.

`gqa.interop.huggingface` writes the folder; `gqa/__main__.py` chooses among the commands.
"""

import argparse

from gqa.checkpoints import network
from gqa.data import tokenizer
from gqa.interop import huggingface
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
        help="repeat each KV head for its query heads: an ordinary T5, with MHA's large cache. "
        "By default the result stays grouped, and Transformers runs it with trust_remote_code=True",
    )
    parser.add_argument(
        "--vocabulary",
        help="SentencePiece file to put beside the weights, with a tokenizer.json of it",
    )


def run(options: argparse.Namespace) -> None:
    """Load the checkpoint and write it as a folder of Hugging Face."""
    trained = network.load(options.checkpoint)
    vocabulary = options.vocabulary
    if vocabulary and tokenizer.load(vocabulary).hash != trained.info.get("vocabulary"):
        raise UserError(
            f"{vocabulary} is not the vocabulary that {options.checkpoint} was trained with"
        )
    huggingface.save(trained.params, trained.config, options.folder, options.expand, vocabulary)

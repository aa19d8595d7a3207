"""The command `python -m gqa export`: its arguments and what it does with them.

`gqa.interop.huggingface` and `gqa/interop/ctranslate2_folders.py` write the folder;
`gqa/__main__.py` chooses among the commands.
"""

import argparse

from gqa.checkpoints import network
from gqa.data import tokenizer
from gqa.interop import ctranslate2_folders, huggingface
from gqa.runtime.checks import check_choice
from gqa.runtime.errors import ConfigError, UserError

HUGGING_FACE, CTRANSLATE2 = FORMATS = ("huggingface", "ctranslate2")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="the folder of a step, or the folder of all steps"
    )
    parser.add_argument("folder", metavar="FOLDER", help="where config.json and the weights go")
    parser.add_argument(
        "--format",
        default=HUGGING_FACE,
        help=f"{HUGGING_FACE} (default), or {CTRANSLATE2}, which is grouped and needs --vocabulary",
    )
    parser.add_argument(
        "--expand",
        action="store_true",
        help="repeat each KV head for its query heads: an ordinary T5, with MHA's large cache. "
        "By default the result stays grouped, and Transformers runs it with trust_remote_code=True",
    )
    parser.add_argument(
        "--vocabulary",
        help="SentencePiece file or tokenizer's folder; its tokenizer.json goes beside the weights",
    )


def run(options: argparse.Namespace) -> None:
    """Load the checkpoint and write it in the format that was chosen.

    Raises:
        UserError: for arguments that cannot be used together, and what the writers refuse.
    """
    check_choice("--format", options.format, FORMATS)
    vocabulary = options.vocabulary
    if options.format == CTRANSLATE2 and options.expand:
        raise ConfigError("--expand", True, "leave it out", f"is not for --format={CTRANSLATE2}")
    if options.format == CTRANSLATE2 and not vocabulary:
        raise UserError(f"--format={CTRANSLATE2} works on tokens; name their --vocabulary=FILE")

    trained = network.load(options.checkpoint)
    if vocabulary and tokenizer.load(vocabulary).hash != trained.info.get("vocabulary"):
        raise UserError(
            f"{vocabulary} is not the vocabulary that {options.checkpoint} was trained with"
        )
    if options.format == CTRANSLATE2:
        ctranslate2_folders.save(trained.params, trained.config, options.folder, vocabulary)
    else:
        huggingface.save(trained.params, trained.config, options.folder, options.expand, vocabulary)

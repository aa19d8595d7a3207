"""The command `python -m gqa convert`: its arguments and what it does with them.

`gqa.decoder_only.convert` does the work; `gqa/__main__.py` chooses among the commands.
"""

import argparse

from gqa.decoder_only import convert


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument(
        "source",
        metavar="SRC",
        help="folder with config.json and safetensors, or a model's name on the Hub",
    )
    parser.add_argument(
        "target", metavar="DST", help="new folder, or one that an interrupted run left behind"
    )
    parser.add_argument(
        "--num-kv-heads", type=int, required=True, help="KV heads after the conversion"
    )
    parser.add_argument("--method", default="mean", help="mean (the default), first or svd")


def run(options: argparse.Namespace) -> None:
    """Write the folder DST: the checkpoint SRC with fewer KV heads."""
    convert.convert(options.source, options.target, options.num_kv_heads, options.method)

"""Rewrite a decoder-only Hugging Face checkpoint with fewer KV heads.

python -m gqa.decoder_only SRC DST --num-kv-heads=8 --method=mean
"""

import functools
import sys

from gqa.decoder_only import convert
from gqa.runtime import command_line


def main(argv: list[str]) -> None:
    """Parse and convert."""
    parser = command_line.Parser(
        prog="python -m gqa.decoder_only", description=__doc__.splitlines()[0]
    )
    parser.add_argument("source", metavar="SRC", help="folder with config.json and safetensors")
    parser.add_argument("target", metavar="DST", help="new folder, or one that a kill left")
    parser.add_argument("--num-kv-heads", type=int, required=True, help="KV heads afterwards")
    parser.add_argument("--method", default="mean", help="mean, first or svd")
    options = parser.parse_args(argv[1:])
    convert.convert(options.source, options.target, options.num_kv_heads, options.method)


if __name__ == "__main__":
    sys.exit(command_line.status(functools.partial(main, sys.argv)))

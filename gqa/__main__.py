"""The command line of the library: python -m gqa COMMAND, or gqa COMMAND once installed.

Only the choice of a command stands here. Each command is a module with two functions:
`add_arguments(parser)` declares the arguments, `run(options)` does the work. Experiments have a
command line of their own, launch.py.
"""

import functools
import importlib
import sys
from collections.abc import Sequence

from gqa.runtime import command_line, signals

# Name of a command: its module, and what it does.
COMMANDS = {
    "convert": (
        "gqa.decoder_only.command",
        "Write a decoder-only Hugging Face checkpoint with fewer KV heads.",
    ),
    "export": (
        "gqa.interop.huggingface.command",
        "Write a checkpoint of this project for Transformers or CTranslate2.",
    ),
    "generate": (
        "gqa.inference.command",
        "Print the texts that one or several checkpoints give for the same inputs.",
    ),
    "kv-cache": (
        "gqa.kv_cache.command",
        "Print the KV cache bytes of a decoder for every number of KV heads.",
    ),
}


def run_command(arguments: Sequence[str]) -> None:
    """Run the command that the arguments name.

    Raises:
        UserError: for an unknown command or argument, and from the command itself.
    """
    parser = command_line.Parser(
        prog="python -m gqa",
        description="The commands of the library; experiments are run by launch.py.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    modules = {}
    for name, (module, purpose) in COMMANDS.items():
        subparser = commands.add_parser(name, help=purpose, description=purpose)

        # Import only a command that is asked for: each of them imports JAX, which takes seconds.
        if name in arguments:
            modules[name] = importlib.import_module(module)
            modules[name].add_arguments(subparser)

    options = parser.parse_args(arguments)
    modules[options.command].run(options)


def main() -> int:
    """Run the command of this process's arguments and return the exit status.

    After a signal the command leaves in order: temporary files are deleted.
    """
    signals.install()
    return command_line.status(functools.partial(run_command, sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())

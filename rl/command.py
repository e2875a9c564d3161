"""How the commands of this package begin and end: recipe first, overrides after it, one line for what has one, and exit codes.

0 finished, 1 stopped, 2 a mistake in recipe or inputs, 75 asked to end (SIGTERM) with a checkpoint left: start again with the same
command. Loads nothing heavy.
"""

import argparse
import os
import sys

from data.recipe import InputError

AGAIN = 75
"""EX_TEMPFAIL: a scheduler may start the same command again."""


def command_line(module: str, description: str) -> argparse.ArgumentParser:
    """Recipe, overrides and --dry-run; a command adds what is its own. To be read with `parse_intermixed_args`: options stand anywhere."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("recipe", help="YAML file, such as recipes/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the recipe")
    parser.add_argument("--dry-run", action="store_true", help="check everything and say what would be done; loads no model")
    return parser


def main_rank() -> bool:
    """Whether this process is the one that speaks."""
    return os.environ.get("RANK", "0") == "0"


def mistake(error: InputError) -> int:
    """Says what is wrong with recipe or inputs; the exit code."""
    return _say(str(error), 2)


def stopped(error: BaseException, place: str) -> int | None:
    """Says why a run ended, if the error has a message of its own, and returns the exit code; None: it is to be raised again."""
    from rl.engines.base import EngineDead
    from rl.run import Interrupted
    from rl.stream import RunStopped

    if not isinstance(error, Interrupted | RunStopped | EngineDead):
        return None
    return _say(f"{place}: {error}", AGAIN if isinstance(error, Interrupted) else 1)


def _say(line: str, code: int) -> int:
    if main_rank():
        print(line, file=sys.stderr)
    return code

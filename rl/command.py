"""How the commands of this package begin and end: recipe first, overrides after it, one line for what has one, and exit codes.

0 finished, 1 stopped, 2 a mistake in recipe or inputs, 75 asked to end (SIGTERM or Ctrl-C) with a checkpoint left: start again with the
same command, 130 ended at once by a second Ctrl-C. Loads nothing heavy.
"""

import argparse
import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

from data.recipe import InputError

AGAIN = 75
"""EX_TEMPFAIL: a scheduler may start the same command again."""
AT_ONCE = 130
"""As a shell has it for a program that Ctrl-C ended."""


def command_line(module: str, description: str) -> argparse.ArgumentParser:
    """Recipe, overrides and --dry-run; a command adds what is its own. To be read with `parse_intermixed_args`: options stand anywhere."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("recipe", help="YAML file, such as recipes/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the recipe")
    parser.add_argument("--dry-run", action="store_true", help="check everything and say what would be done; loads no model")
    return parser


@contextmanager
def asked_to_end(ask: Callable[[], None]) -> Iterator[None]:
    """Within, SIGTERM and a first Ctrl-C call `ask`; a second Ctrl-C is a KeyboardInterrupt. For the main thread.

    A Ctrl-C that this process was started to ignore, as a shell's scripts start those in the background, stays ignored.
    """
    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    again = "Ctrl-C again ends it at once"
    if "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:  # the launcher ends with the first
        again = f"`kill -INT {os.getpid()}` ends it at once"

    def asked(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, before[signal.SIGINT])
            if main_rank():
                os.write(2, f"\nasked to end after what it is doing; {again}\n".encode())  # print is not for a signal handler
        ask()

    for number, handler in before.items():
        if number == signal.SIGTERM or handler is not signal.SIG_IGN:
            signal.signal(number, asked)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave(code: int) -> NoReturn:
    """Ends this process with `code`. One of several ranks goes without the interpreter's teardown.

    A whole run on two nodes was seen once to end with a SIGABRT of the rank that had nothing left to do, so that its launcher said it
    had failed. The likely cause: teardown meets threads of gloo that still let go of tensors, for which they need the interpreter.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        threading._shutdown()  # type: ignore[attr-defined]  # as the interpreter would: threads first,
        atexit._run_exitfuncs()  # then what was registered
        with suppress(OSError):  # whoever read them is gone
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main_rank() -> bool:
    """Whether this process is the one that speaks."""
    return os.environ.get("RANK", "0") == "0"


def mistake(error: InputError) -> int:
    """Says what is wrong with recipe or inputs; the exit code."""
    return _say(str(error), 2)


def exit_code(error: BaseException) -> int:
    """Of a run that this ended."""
    from rl.run import Interrupted

    return AGAIN if isinstance(error, Interrupted) else AT_ONCE if isinstance(error, KeyboardInterrupt) else 1


def stopped(error: BaseException, place: str) -> int | None:
    """Says why a run ended, if the error has a message of its own, and returns the exit code; None: it is to be raised again."""
    from rl.engines.base import EngineDead
    from rl.run import Interrupted
    from rl.stream import RunStopped

    if isinstance(error, KeyboardInterrupt):
        return _say(f"{place}: ended at once; start again with the same command to go on from its last checkpoint", exit_code(error))
    if not isinstance(error, Interrupted | RunStopped | EngineDead):
        return None
    return _say(f"{place}: {error}", exit_code(error))


def _say(line: str, code: int) -> int:
    if main_rank():
        print(line, file=sys.stderr)
    return code

"""`python -m rewards.sandbox doctor`: tries every backend here and says which one runs programs, and why the others do not."""

import argparse
import sys

from rewards.sandbox.judge import Sandbox
from rewards.sandbox.limits import BACKENDS, SandboxError


def doctor() -> int:
    """Prints a line for each backend and the choice; the exit code is 1 if none holds."""
    held = []
    for name in BACKENDS:
        try:
            with Sandbox(name) as sandbox:
                facts = sandbox.facts
        except SandboxError as error:
            print(f"{name:<11} refused: {error}")
            continue
        held.append(name)
        landlock = f"Landlock {facts['landlock']}" if facts["landlock"] else "no Landlock"
        print(f"{name:<11} runs programs: {landlock}, as user {facts['uid']}, {'with' if facts['proc'] else 'without'} /proc")
    chosen = next((name for name in ("namespaces", "landlock") if name in held), None)
    print(f"default: {chosen or 'none, code rewards are refused'}{' (the weaker one: no namespaces)' if chosen == 'landlock' else ''}")
    return 0 if chosen else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m rewards.sandbox", description=__doc__)
    parser.add_argument(
        "command", choices=["doctor"], help="which isolation of model-written programs this machine gives, and why no other"
    )
    parser.parse_args()
    sys.exit(doctor())

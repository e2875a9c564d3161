"""`python -m rewards.sandbox doctor`: tries every backend here and says which one runs programs, and why the others do not."""

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
    if sys.argv[1:] != ["doctor"]:
        sys.exit("python -m rewards.sandbox doctor")
    sys.exit(doctor())

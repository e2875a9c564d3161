"""Sandbox runs a second against a plain `subprocess` with the same rlimits, interleaved: `python -m tests.bench.sandbox`."""

import subprocess
import sys
import time

from rewards.sandbox.confine import set_limits
from rewards.sandbox.judge import Sandbox
from rewards.sandbox.limits import Limits

SOURCE, LIMITS, ROUNDS, RUNS = "print(sum(map(int, input().split())))", Limits(), 10, 20


def plain() -> None:
    command = [sys.executable, "-I", "-c", SOURCE]
    subprocess.run(command, input=b"3 4", capture_output=True, check=True, preexec_fn=lambda: set_limits(LIMITS, own_count=False))


def main() -> None:
    seconds = {"sandbox": 0.0, "subprocess": 0.0}
    with Sandbox() as sandbox:
        for _ in range(ROUNDS):
            for name, run in (("sandbox", lambda: sandbox.script(SOURCE, "3 4", LIMITS)), ("subprocess", plain)):
                began = time.perf_counter()
                for _ in range(RUNS):
                    run()
                seconds[name] += time.perf_counter() - began
    rates = {name: ROUNDS * RUNS / taken for name, taken in seconds.items()}
    print({name: round(rate, 1) for name, rate in rates.items()}, f"ratio {rates['sandbox'] / rates['subprocess']:.2f}")


if __name__ == "__main__":
    main()

"""What the account costs at 1,000 groups a step: seconds of a step and bytes on disk.

    python tests/bench/journal.py [--groups 1000] [--size 8] [--tokens 500] [--steps 40] [--every 10] [--step-s 100]

Every step begins its groups, puts their completions and scores, ends them, and every few steps a checkpoint contains them, with the
check that the sums close. Seconds are those of the journal alone, making the completions left out; `--step-s` is the step time that
they are held against.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(CHECKOUT)]

import numpy as np  # noqa: E402

from data.journal import Journal, Slot  # noqa: E402
from data.journal_sums import TRAINED, ZERO_ADVANTAGE  # noqa: E402
from data.values import Completion, Score, completion_seed  # noqa: E402


class Clock:
    """Seconds of the journal, by what it did."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu = 0.0

    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - wall
        self.cpu += time.process_time() - cpu


def completions(group: str, prompt: str, size: int, tokens: int, rng: np.random.Generator) -> list[Completion]:
    lengths = np.clip(rng.lognormal(np.log(tokens), 0.6, size), 1, 8 * tokens).astype(int)
    return [
        Completion(
            prompt, group, index, 0, completion_seed(0, prompt, 0, index), rng.integers(0, 150_000, n).astype(np.int32),
            np.ones(n, np.uint8), rng.normal(-1.0, 1.0, n).astype(np.float32), np.zeros(n, np.int32), "stop", "engine-0",
        )
        for index, n in enumerate(lengths)
    ]  # fmt: skip


def one_step(journal: Journal, step: int, arguments: argparse.Namespace, rng: np.random.Generator, clock: Clock) -> None:
    slots = [Slot("run", step * arguments.groups + i, f"prompt-{i}") for i in range(arguments.groups)]
    with clock.running("begin"):
        begun = journal.begin(slots, arguments.size, step, step)
    scores = {i: Score(float(i % 2), parts={"math_answer": float(i % 2), "brevity": 0.125 * i}) for i in range(arguments.size)}
    for attempt in begun:
        made = completions(attempt.group_id, attempt.slot.prompt_id, arguments.size, arguments.tokens, rng)
        with clock.running("completions"):
            journal.put_completions(made)
        with clock.running("scores"):
            journal.put_scores(attempt.group_id, scores)
    with clock.running("uses"), journal.transaction():
        for attempt in begun:
            journal.use(attempt.group_id, step, TRAINED if attempt.key % 3 else ZERO_ADVANTAGE)


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(description="What the account costs.")
    parser.add_argument("--groups", type=int, default=1000)
    parser.add_argument("--size", type=int, default=8, help="completions a group")
    parser.add_argument("--tokens", type=int, default=500, help="median length; lognormal with sigma 0.6")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints, of which the two newest are kept")
    parser.add_argument("--step-s", type=float, default=100.0)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder, total, cpu = Path(name), 0.0, 0.0
        with Journal(folder / "journal.sqlite") as journal:
            for step in range(arguments.steps):
                clock = Clock()
                one_step(journal, step, arguments, rng, clock)
                if (step + 1) % arguments.every == 0:
                    with clock.running("flush"):
                        journal.flush()
                    with clock.running("contain"):
                        journal.contain(step + 1, oldest=step + 1 - arguments.every)
                seconds = sum(clock.seconds.values())
                total, cpu = total + seconds, cpu + clock.cpu
                if (step + 1) % arguments.every in (0, 1):
                    parts = "  ".join(f"{name} {value:.2f}" for name, value in clock.seconds.items())
                    print(
                        f"step {step + 1:>4}: {seconds:5.2f} s, CPU {clock.cpu:5.2f} s ({parts})  {size_of(folder) / 1e6:8.1f} MB on disk",
                        flush=True,
                    )
            began = time.perf_counter()
            sums = journal.sums()
            whole = time.perf_counter() - began
            began = time.perf_counter()
            journal.account("math_answer")
            account = time.perf_counter() - began
            kept = journal._db.execute("SELECT count(*) FROM arrays").fetchone()[0]
            path = folder / "copy.sqlite"
            journal._db.execute("DELETE FROM arrays")
            journal._db.execute("VACUUM INTO ?", (str(path),))
            for_good = path.stat().st_size
    count = arguments.steps * arguments.groups * arguments.size
    each = total / arguments.steps
    share = f"{100 * each / arguments.step_s:.2f} % of a step of {arguments.step_s:g} s"
    print(f"a step: {each:.2f} s of the journal ({cpu / arguments.steps:.2f} CPU seconds), {share}")
    print(f"on disk for good: {for_good / count:.0f} bytes a completion; arrays are kept of {kept:,} of {count:,} completions")
    print(f"the whole account, {sums.sampled:,} tokens: sums {whole:.2f} s, with pass rates {account:.2f} s")


if __name__ == "__main__":
    main()

"""Rows a second of the whole cleaning chain, and of its dedup against datasketch's: python -m tests.bench.cleaning [rows…]

Rows are made: a prompt of 50 words and a completion of 70 with words as frequent as in English, and of every hundred rows two are
near copies of earlier ones and one is an exact copy. The chain is `data.clean` as a user calls it (every filter but the language
identifier, decontamination against 1,000 prompts, exact and near dedup, parquet files), in a process of its own for each size, so
that peak memory is its own. Seconds are CPU seconds, in which other work on the machine counts little. Against datasketch both
sides take the same rows in the same process, in turns of 500. It is run by hand; nothing in it is asserted."""

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datasketch import MinHash, MinHashLSH

from data.clean import main as clean
from data.clean_config import NearConfig
from data.near import NearDuplicates
from data.text import words

TURN = 500
"""Rows of one turn."""
VOCABULARY = 30_000


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        one(Path(sys.argv[2]), int(sys.argv[3]))
        return
    sizes = [int(size) for size in sys.argv[1:]] or [10_000, 100_000]
    with tempfile.TemporaryDirectory() as folder:
        against_datasketch(sizes[0])
        print(f"{'rows':>10} {'s':>8} {'rows/s':>8} {'MiB':>7}  removed")
        for size in sizes:
            write_rows(Path(folder), size)
            done = subprocess.run(
                [sys.executable, "-m", "tests.bench.cleaning", "--one", folder, str(size)], check=True, capture_output=True
            )
            print(done.stdout.decode().splitlines()[-1], flush=True)


def one(folder: Path, size: int) -> None:
    """Cleans the rows of a folder in this process."""
    start = time.process_time()
    assert clean([str(folder / "rows.jsonl"), "--out", str(folder / "out.parquet"), "--against", str(folder / "evaluation.jsonl")]) == 0
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    removed = json.loads((folder / "report.json").read_text())["rejected"]
    print(f"{size:>10,} {seconds:>8.1f} {size / seconds:>8,.0f} {peak:>7.0f}  {removed}")


def against_datasketch(size: int) -> None:
    """Near dedup alone, ours (candidates verified) and theirs (MinHash and its LSH: candidates), interleaved."""
    texts = [words(f"{row['prompt']} {row['completion']}") for row in rows(size)]
    seconds = {"ours": 0.0, "datasketch": 0.0}
    lsh = MinHashLSH(threshold=0.8, num_perm=128)
    candidates = 0
    with tempfile.TemporaryDirectory() as folder, NearDuplicates(NearConfig(), Path(folder)) as near:
        for turn, start in enumerate(range(0, size, TURN)):
            for side in ("ours", "datasketch") if turn % 2 else ("datasketch", "ours"):
                began = time.process_time()
                for place, found in enumerate(texts[start : start + TURN], start):
                    if side == "ours":
                        near.add(found, [], None)
                    else:
                        sketch = MinHash(num_perm=128)
                        sketch.update_batch([f"{a} {b}".encode() for a, b in zip(found, found[1:], strict=False)])
                        candidates += bool(lsh.query(sketch))
                        lsh.insert(place, sketch)
                seconds[side] += time.process_time() - began
        began = time.process_time()
        copies = near.copies([0.0] * size)
        seconds["ours"] += time.process_time() - began
    ours, theirs = size / seconds["ours"], size / seconds["datasketch"]
    print(f"near dedup of {size:,} rows, ours: {ours:,.0f} rows/s, {len(copies)} copies, each verified")
    print(f"  datasketch: {theirs:,.0f} rows/s, {candidates} candidates; ours is {ours / theirs:.1f} times as fast", flush=True)


def write_rows(folder: Path, size: int) -> None:
    """rows.jsonl of so many rows, and evaluation.jsonl of 1,000 prompts, five of which stand in the rows."""
    evaluation = [row["prompt"] for row in rows(1_000, seed=1)]
    with (folder / "rows.jsonl").open("w") as file:
        for number, row in enumerate(rows(size)):
            if number % (size // 5) == 7:
                row["prompt"] += evaluation[number % 1_000]
            file.write(json.dumps(row) + "\n")
    (folder / "evaluation.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in evaluation))


def rows(size: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """Made rows; a word's frequency falls with its rank, and one word in twelve is a number."""
    rng = random.Random(seed)
    bits = np.random.default_rng(seed)
    shares = 1.0 / np.arange(3, VOCABULARY + 3)
    cumulative = np.cumsum(shares / shares.sum())
    names = ["".join(rng.choices("abcdefghijklmnoprstuvw", k=rng.randint(2, 9))) for _ in range(VOCABULARY)]
    recent: list[list[str]] = []
    for start in range(0, size, 1_000):
        drawn = np.searchsorted(cumulative, bits.random((1_000, 120)))
        for number, ranks in enumerate(drawn[: size - start].tolist()):
            text = [names[rank] if place % 12 else str(rng.randint(2, 9_999)) for place, rank in enumerate(ranks)]
            if number % 100 in (33, 66, 99) and recent:
                text = list(rng.choice(recent))
                if number % 100 != 99:
                    for place in rng.sample([place for place in range(120) if place % 12], 3):
                        text[place] = rng.choice(names)
            elif number % 10 == 0:
                recent = [*recent[-200:], text]
            yield {
                "prompt": " ".join(text[:50]) + "?",
                "completion": ". ".join(" ".join(text[at : at + 14]) for at in range(50, 120, 14)) + ".",
            }


if __name__ == "__main__":
    main()

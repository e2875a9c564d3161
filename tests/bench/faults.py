"""Two vLLM engines, of which one is killed every so often: no group may be lost, and sampling goes on.

    python tests/bench/faults.py [POLICY] [--every 15] [--seconds 120] [--undisturbed 60]

Samples without end from a policy (left out: a tiny random one), as many completions in flight as the engines take: undisturbed for
half of `--undisturbed` seconds, then for `--seconds` with a `kill -9` every `--every` seconds, the engines in turn, then the other
half. Throughput is tokens of finished completions over wall seconds. The engines have weights that came by an update, not those they
start with, and every completion has to be of these; prompts and seeds are the same in all three phases, and the phases are compared
token by token. Needs two cores, one for each engine. Exit code 1 if a group was lost or came twice, or was not of the current weights.
"""

import argparse
import itertools
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from harness import line, table

import policies  # isort: skip  # `harness` has put tests/ on the path
from data.values import Completion
from rl.engines.base import EngineDead, Request, Sampling
from rl.engines.vllm import VllmEngine
from rl.engines.weights import read_manifest
from rl.policy import checkpoint_views, load_model
from rl.pool import RolloutPool
from rl.sync import WeightSync

GROUP = 8
PROMPT_TOKENS = 24


@dataclass
class Phase:
    """What one stretch of sampling gave."""

    seconds: float = 0.0
    tokens: int = 0
    """Of completions that finished within `seconds`."""
    groups: dict[int, dict[int, Completion]] = field(default_factory=dict)
    twice: int = 0
    kills: int = 0
    down_at_kill: int = 0
    """Kills that found the engine down."""


def requests(phase: str, number: int, sampling: Sampling, vocabulary: int) -> list[Request]:
    rng = np.random.default_rng(number)
    prompt = rng.integers(2, vocabulary, PROMPT_TOKENS).astype(np.int32)
    return [Request(f"p{number}", f"{phase}/{number}", 0, i, int(rng.integers(1 << 62)), prompt, sampling, number) for i in range(GROUP)]


def sample(
    pool: RolloutPool, name: str, seconds: float, sampling: Sampling, vocabulary: int, every: float | None, engines: list[VllmEngine]
) -> Phase:
    phase, numbers, victims = Phase(), itertools.count(), itertools.cycle(engines)
    in_flight = 2 * sum(engine.slots for engine in engines)
    began = time.monotonic()
    kill_at = began + every if every is not None else float("inf")
    while (now := time.monotonic()) < began + seconds:
        while pool.open < in_flight:
            number = next(numbers)
            phase.groups[number] = {}
            pool.submit(requests(name, number, sampling, vocabulary))
        if now >= kill_at:
            kill(next(victims), phase)
            kill_at += every or 0.0
        phase.tokens += take(pool, phase)
    phase.seconds = time.monotonic() - began
    while pool.open:
        take(pool, phase)
    return phase


def take(pool: RolloutPool, phase: Phase) -> int:
    tokens = 0
    for completion in pool.poll(0.05):
        group = phase.groups[int(completion.prompt_id[1:])]
        phase.twice += completion.index in group
        group[completion.index] = completion
        tokens += len(completion.token_ids)
    return tokens


def kill(engine: VllmEngine, phase: Phase) -> None:
    try:
        os.kill(engine.pid, signal.SIGKILL)
        phase.kills += 1
    except (EngineDead, ProcessLookupError):
        phase.down_at_kill += 1


def row(name: str, phase: Phase, pool: RolloutPool) -> dict[str, Any]:
    completions = [c for group in phase.groups.values() for c in group.values()]
    return {
        "phase": name,
        "tokens_per_s": round(phase.tokens / phase.seconds, 1),
        "groups": len(phase.groups),
        "groups_lost": sum(len(group) != GROUP for group in phase.groups.values()),
        "came_twice": phase.twice,
        "of_other_weights": sum(int((c.policy_version != 1).sum()) for c in completions),
        "kills": phase.kills,
        "down_at_kill": phase.down_at_kill,
        **{name: int(value) for name, value in pool.metrics().items()},
    }


def differing(a: Phase, b: Phase) -> tuple[int, int, float]:
    """Completions both phases have, how many of them differ in a token, and the largest difference of a log-prob in the others."""
    pairs = [(a.groups[n][i], b.groups[n][i]) for n in a.groups.keys() & b.groups.keys() for i in range(GROUP)]
    alike = [(x, y) for x, y in pairs if np.array_equal(x.token_ids, y.token_ids)]
    return len(pairs), len(pairs) - len(alike), max((float(np.abs(x.engine_logp - y.engine_logp).max()) for x, y in alike), default=0.0)


class Export:
    """The weights of a policy folder, in the place of the learner's."""

    def __init__(self, policy: Path) -> None:
        self.model = load_model(policy, policies.torch.float32)

    def export(self) -> Iterator[tuple[str, Any]]:
        yield from checkpoint_views(self.model)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("policy", nargs="?", type=Path)
    parser.add_argument("--every", type=float, default=15.0)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--undisturbed", type=float, default=60.0)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=200)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        first = policies.tiny_qwen3_moe(Path(folder) / "first", seed=0)
        policy = arguments.policy or policies.tiny_qwen3_moe(Path(folder) / "current", seed=1)
        return run(arguments, policy, policy if arguments.policy else first, Path(folder))


def run(arguments: argparse.Namespace, policy: Path, first: Path, logs: Path) -> int:
    learner = Export(policy)
    sampling, vocabulary = Sampling(arguments.max_tokens), learner.model.config.vocab_size
    length, slots = PROMPT_TOKENS + arguments.max_tokens, arguments.slots
    engines = [VllmEngine(n, first, log_path=logs / f"{n}.log", max_model_len=length, slots=slots) for n in ("engine-0", "engine-1")]
    sync = WeightSync(engines, read_manifest(first))
    rows, phases = [], {}
    half = arguments.undisturbed / 2
    with RolloutPool(engines, say=lambda said: print(f"{time.strftime('%H:%M:%S')} {said}", file=sys.stderr)) as pool:
        pool.catch_up = sync.replay
        sync.push(learner, version=1)
        for name, seconds, every in (("before", half, None), ("disturbed", arguments.seconds, arguments.every), ("after", half, None)):
            phases[name] = sample(pool, name, seconds, sampling, vocabulary, every, engines)
            rows.append(row(name, phases[name], pool))
            line(rows[-1])
    sync.close()
    undisturbed = (phases["before"].tokens + phases["after"].tokens) / (phases["before"].seconds + phases["after"].seconds)
    share = phases["disturbed"].tokens / phases["disturbed"].seconds / undisturbed
    common, other, distance = differing(phases["before"], phases["disturbed"])
    table(rows, tuple(rows[0]))
    print(f"\nthroughput under faults: {100 * share:.1f} % of undisturbed (wanted: at least 60 %)")
    print(f"of {common} completions sampled in both, {other} have other tokens; log-probs of the others differ by at most {distance:.1e}")
    wrong = sum(r["groups_lost"] + r["came_twice"] + r["of_other_weights"] for r in rows)
    print("no group lost, none twice, all of the current weights" if not wrong else "WRONG: see groups_lost, came_twice, of_other_weights")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())

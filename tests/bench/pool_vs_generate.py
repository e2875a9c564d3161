"""The pool with one vLLM engine against bare `LLM.generate`: the same prompts, seeds and settings, turn by turn in the same run.

    python tests/bench/pool_vs_generate.py POLICY [--prompts 64] [--group 8] [--max-tokens 48] [--turns 7]

What is compared is tokens per engine-busy second: for the pool, seconds in which the engine had work (`Health.busy_s`); for
`generate`, seconds of the call. Tokens over the pool's wall seconds, from the first submit to the last completion, stand beside, and
tokens per CPU second of the sampling process, which hold on a machine that others use as well. `generate` is asked twice a turn, once
with the settings an engine has and once with vLLM's own for `LLM` (its larger budget of tokens a step). Each is a process of its own
that waits while another samples; all sample the same tokens, and that is asserted. Needs two cores and nothing else on the machine:
beside other work, or on one core with the trainer's process, seconds say more of the scheduler than of the pool.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from harness import line, table

from rl.engines.base import Request, Sampling
from rl.engines.vllm import VllmEngine, VllmSpec, log_tail
from rl.pool import RolloutPool


def make_requests(arguments: argparse.Namespace, vocabulary: int, turn: int) -> list[list[Request]]:
    """Groups; their prompts and seeds depend on the turn."""
    rng = np.random.default_rng(turn)
    sampling = Sampling(arguments.max_tokens)
    groups = []
    for p in range(arguments.prompts):
        prompt = rng.integers(2, vocabulary, arguments.prompt_tokens).astype(np.int32)
        seeds = rng.integers(1 << 62, size=arguments.group).tolist()
        groups.append([Request(f"p{p}", f"{turn}/{p}", 0, i, seed, prompt, sampling, p) for i, seed in enumerate(seeds)])
    return groups


def bare(pipe: Connection, spec: VllmSpec, own_settings: bool) -> None:
    """A process with an `LLM`; answers groups with seconds and tokens."""
    with spec.log_path.open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    from vllm import LLM
    from vllm.inputs import TokensPrompt

    from rl.engines.vllm_worker import engine_config, sampling_params

    config = engine_config(spec)  # sets threads and environment as for an engine
    settings: dict[str, Any] = {}
    if not own_settings:
        settings["max_num_batched_tokens"] = config.scheduler_config.max_num_batched_tokens
    llm = LLM(
        str(spec.policy_path), dtype=spec.dtype, max_model_len=spec.max_model_len, max_num_seqs=spec.slots, enforce_eager=True,
        enable_chunked_prefill=False, kv_cache_memory_bytes=config.cache_config.kv_cache_memory_bytes,
        logprobs_mode="processed_logprobs", disable_log_stats=True, seed=0, **settings,
    )  # fmt: skip
    pipe.send(None)
    while (groups := pipe.recv()) is not None:
        requests = [request for group in groups for request in group]
        prompts = [TokensPrompt(prompt_token_ids=request.prompt_ids.tolist()) for request in requests]
        params = [sampling_params(request) for request in requests]
        began = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        taken = time.perf_counter() - began
        pipe.send((taken, {request.id: list(output.outputs[0].token_ids) for request, output in zip(requests, outputs, strict=True)}))


class Bare:
    """The other end of `bare`."""

    def __init__(self, spec: VllmSpec, own_settings: bool) -> None:
        self.spec = spec
        self.pipe, other = multiprocessing.get_context("spawn").Pipe()
        self.process = multiprocessing.get_context("spawn").Process(target=bare, args=(other, spec, own_settings), daemon=True)
        self.process.start()
        other.close()
        self.ask()

    def ask(self) -> Any:
        try:
            return self.pipe.recv()
        except EOFError:
            sys.exit(f"bare LLM is gone\n{log_tail(self.spec.log_path)}")

    def sample(self, groups: list[list[Request]]) -> tuple[float, float, dict[str, list[int]]]:
        """Seconds, CPU seconds, tokens."""
        cpu = cpu_s(self.process.pid)
        self.pipe.send(groups)
        taken, tokens = self.ask()
        return taken, cpu_s(self.process.pid) - cpu, tokens


def cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def pool_sample(pool: RolloutPool, engine: VllmEngine, groups: list[list[Request]]) -> tuple[float, float, float, dict[str, list[int]]]:
    """Busy seconds, CPU seconds, wall seconds, tokens."""
    tokens: dict[str, list[int]] = {}
    cpu, busy, began = cpu_s(engine.pid), engine.health().busy_s, time.perf_counter()
    pool.collect(groups, lambda completion: tokens.update({completion.id: completion.token_ids.tolist()}))
    wall = time.perf_counter() - began
    return engine.health().busy_s - busy, cpu_s(engine.pid) - cpu, wall, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("policy", type=Path)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--vocabulary", type=int, default=64)
    parser.add_argument("--slots", type=int, default=128)
    parser.add_argument("--turns", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder)
        length = arguments.prompt_tokens + arguments.max_tokens
        engine = VllmEngine("pool", arguments.policy, log_path=logs / "pool.log", max_model_len=length, slots=arguments.slots)
        like, own = (Bare(VllmSpec(**{**vars(engine.spec), "log_path": logs / f"bare{n}.log"}), n == 1) for n in range(2))
        rows = []
        with RolloutPool([engine]) as pool:
            for turn in range(-1, arguments.turns):
                groups = make_requests(arguments, arguments.vocabulary, turn + 1)
                samplers = (partial(pool_sample, pool, engine), like.sample, own.sample)
                # who goes first changes with the turn
                results = {n % 3: samplers[n % 3](groups) for n in range(turn, turn + 3)}
                busy, pool_cpu, wall, tokens = results[0]
                (like_s, like_cpu, like_tokens), (own_s, own_cpu, own_tokens) = results[1], results[2]
                assert tokens == like_tokens == own_tokens, "they did not sample the same"
                count = sum(map(len, tokens.values()))
                rates = {"pool_busy": busy, "pool_wall": wall, "generate": like_s, "generate_own": own_s}
                row = {"turn": turn, "tokens": count} | {f"{name}_tokens_per_s": round(count / s, 1) for name, s in rates.items()}
                row |= {"busy_share": round(like_s / busy, 3), "wall_share": round(like_s / wall, 3), "own_share": round(own_s / busy, 3)}
                row |= {"cpu_share": round(like_cpu / pool_cpu, 3), "own_cpu_share": round(own_cpu / pool_cpu, 3)}
                line(row)
                if turn >= 0:  # the first warms up
                    rows.append(row)
        for one in (like, own):
            one.pipe.send(None)
            one.process.join()
    table(rows, tuple(rows[0]))
    shares = {
        "busy_share": "busy second",
        "wall_share": "wall second",
        "own_share": "busy second, vLLM's own settings",
        "cpu_share": "CPU second",
        "own_cpu_share": "CPU second, vLLM's own settings",
    }
    for name, what in shares.items():
        print(f"pool / generate, tokens per {what}: median {statistics.median(row[name] for row in rows):.3f}")


if __name__ == "__main__":
    main()

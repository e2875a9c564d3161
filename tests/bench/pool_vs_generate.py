"""The pool with one vLLM engine against bare `LLM.generate`: the same prompts, seeds and settings, turn by turn in the same run.

    python tests/bench/pool_vs_generate.py POLICY [--prompts 192] [--group 8] [--max-tokens 48] [--turns 7]

What is compared is tokens per engine-busy second: for the pool, seconds in which the engine had work (`Health.busy_s`); for
`generate`, seconds of the call. Tokens over the pool's wall seconds, from the first submit to the last completion, stand beside, and
tokens per CPU second of the sampling process, which hold on a machine that others use as well. A turn takes several seconds, so that
start and tail, in which slots are free, weigh about as in a step of training. Each is a process of its own that waits while the other
samples; both sample the same tokens, and that is asserted. Needs two cores and nothing else on the machine:
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


def bare(pipe: Connection, spec: VllmSpec) -> None:
    """A process with an `LLM`; answers groups with seconds and tokens."""
    with spec.log_path.open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    from vllm import LLM
    from vllm.inputs import TokensPrompt

    from rl.engines.vllm_worker import engine_config, sampling_params

    config = engine_config(spec)  # sets threads and environment as for an engine
    llm = LLM(
        str(spec.policy_path), dtype=spec.dtype, max_model_len=spec.max_model_len, max_num_seqs=spec.slots, enforce_eager=True,
        enable_chunked_prefill=False, kv_cache_memory_bytes=config.cache_config.kv_cache_memory_bytes,
        logprobs_mode="processed_logprobs", disable_log_stats=True, seed=0,
    )  # fmt: skip
    its_own = llm.llm_engine.vllm_config.scheduler_config
    assert its_own.max_num_batched_tokens == config.scheduler_config.max_num_batched_tokens, "an engine has another budget of tokens"
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

    def __init__(self, spec: VllmSpec) -> None:
        self.spec = spec
        self.pipe, other = multiprocessing.get_context("spawn").Pipe()
        self.process = multiprocessing.get_context("spawn").Process(target=bare, args=(other, spec), daemon=True)
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
    parser.add_argument("--prompts", type=int, default=192)
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
        generate = Bare(VllmSpec(**{**vars(engine.spec), "log_path": logs / "bare.log"}))
        rows = []
        with RolloutPool([engine]) as pool:
            for turn in range(-1, arguments.turns):
                groups = make_requests(arguments, arguments.vocabulary, turn + 1)
                samplers = [partial(pool_sample, pool, engine), generate.sample]
                # who goes first changes with the turn
                results = {n % 2: samplers[n % 2](groups) for n in range(turn, turn + 2)}
                busy, pool_cpu, wall, tokens = results[0]
                taken, cpu, same_tokens = results[1]
                assert tokens == same_tokens, "they did not sample the same"
                count = sum(map(len, tokens.values()))
                rates = {"pool_busy": busy, "pool_wall": wall, "generate": taken}
                row = {"turn": turn, "tokens": count} | {f"{name}_tokens_per_s": round(count / s, 1) for name, s in rates.items()}
                row |= {"busy_share": round(taken / busy, 3), "wall_share": round(taken / wall, 3), "cpu_share": round(cpu / pool_cpu, 3)}
                line(row)
                if turn >= 0:  # the first warms up
                    rows.append(row)
        generate.pipe.send(None)
        generate.process.join()
    table(rows, tuple(rows[0]))
    shares = {"busy_share": "busy second", "wall_share": "wall second", "cpu_share": "CPU second"}
    for name, what in shares.items():
        print(f"pool / generate, tokens per {what}: median {statistics.median(row[name] for row in rows):.3f}")


if __name__ == "__main__":
    main()

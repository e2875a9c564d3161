"""Curation: what kills do to it, and how busy it keeps an engine.

    PYTHONPATH=.:tests python tests/bench/curate.py kills [--engine hf|vllm] [--policy POLICY] [--kills 30] [--prompts 40]
    PYTHONPATH=.:tests python tests/bench/curate.py busy POLICY [--prompts 400] [--group 4] [--turns 5]

kills: a curation of two experts is killed (SIGKILL) at random moments and started again until it ends; with vllm, whose engines load
for long, moments count from the first completion that is asked for. After each kill the journal is read; what it holds may neither be
asked of an engine nor handed to the rewards again. With hf the files at the end are byte for byte those of a run that was never killed.

busy: tokens per engine-busy second of curation, journal, rewards and all, against bare `LLM.generate` on the same prompts, seeds and
settings, turn by turn in the same run. Loading stands apart. `wall` counts from the first request to the last score. Beside them
stand tokens per CPU second of the sampling process, and how much CPU time all other processes of the curation took for each of it:
these hold on a machine that others use as well. Seconds need two cores and nothing else on them: on one core with the curation's own
processes they say more of the scheduler than of curation. An engine is a session of its own, and where the kernel groups tasks by
session, a priority reaches it by /proc/PID/autogroup alone.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
from curation import Killed, files_of, small_recipe, write_recipe
from harness import line, table

from data.recipe import parse


def kills(arguments: argparse.Namespace) -> None:
    import sft.records
    import sft.sampling  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        for place in (whole, killed):
            place.mkdir()
            write_recipe(place, _recipe(place, arguments))
        began, loads = time.monotonic(), arguments.engine == "vllm"
        assert Killed(whole).run_for(1800) == 0, (whole / "log.txt").read_text()[-2000:]
        ended = time.monotonic()
        taken = ended - (_first_asked(whole / "asked.jsonl") if loads else began)
        curation, rng = Killed(killed), random.Random(arguments.seed)
        done, line_number, repeated = 0, 0, 0
        while True:
            completions, scored = curation.held()
            code = curation.run_for(rng.uniform(0.0, 0.7 * taken), loads) if done < arguments.kills else curation.run_for(1800)
            asked, judged, line_number = curation.asked_since(line_number)
            repeated += len(asked & completions) + len(judged & scored)
            line({"kill": done, "held": len(completions), "scored": len(scored), "asked": len(asked), "repeated": repeated, "code": code})
            if code is not None and (code != 0 or done >= arguments.kills):
                break
            if code == 0:  # it ended before its kill: the next one starts from nothing
                shutil.rmtree(killed / "outputs")
                continue
            done += 1
        assert code == 0, (killed / "log.txt").read_text()[-2000:]
        same = files_of(killed / "outputs/curation/curated") == files_of(whole / "outputs/curation/curated")
        print(f"{done} kills, {repeated} completions or groups asked for again, files byte for byte the same: {same}")
        assert not repeated and (same or arguments.engine == "vllm")


def _first_asked(notes: Path) -> float:
    """When the first completion was asked for, by time.monotonic; engines are loaded then."""
    return json.loads(notes.read_text().splitlines()[0])["at"]


def _recipe(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    recipe = small_recipe(folder, prompts=arguments.prompts, mix={"weights": {"one": 2, "two": 1}, "unit": "tokens"})
    if arguments.engine == "vllm":
        for expert in recipe["experts"]:
            expert["rollout"] = expert["rollout"] | {"engine": "vllm", "slots": 16, "max_tokens": 32}
            if arguments.policy:
                expert["path"] = str(arguments.policy.absolute())
    return recipe


# --- busy ---------------------------------------------------------------------------------------------------------------


def busy(arguments: argparse.Namespace) -> None:
    from rl.engines.vllm import VllmEngine
    from sft.curate_config import CurateRecipe
    from sft.experts import Expert

    with tempfile.TemporaryDirectory() as folder:
        recipe = parse(
            {
                "run": {"name": "busy", "output_dir": folder},
                "experts": [
                    {
                        "name": "expert",
                        "path": str(arguments.policy),
                        "prompts": {"task": "arithmetic", "limit": arguments.prompts},
                        "rollout": {"group_size": arguments.group, "max_tokens": 48, "slots": arguments.slots},
                    }
                ],
                "rewards": {"parts": [{"name": "math_answer", "requires": "think_format"}]},
            },
            CurateRecipe,
            "benchmark",
        )
        expert = Expert(recipe, recipe.experts[0])
        log = Path(folder) / "bare.log"
        spec = VllmEngine("bare", arguments.policy, log_path=log, max_model_len=expert.max_model_len, slots=arguments.slots).spec
        pipe, other = multiprocessing.get_context("spawn").Pipe()
        process = multiprocessing.get_context("spawn").Process(target=bare, args=(other, spec), daemon=True)
        process.start()
        pipe.recv()
        rows = []
        for turn in range(arguments.turns):
            ours = curated(recipe, expert, Path(folder) / f"turn-{turn}")
            cpu = cpu_s(process.pid)
            pipe.send(ours.pop("requests"))
            seconds, tokens = pipe.recv()
            cpu = cpu_s(process.pid) - cpu
            assert tokens == ours["tokens"], f"they did not sample the same: {tokens} tokens and {ours['tokens']}"
            rates = {"ours_busy": ours["busy_s"], "ours_wall": ours["wall_s"], "generate": seconds}
            row = {"turn": turn, "tokens": tokens, "loading_s": round(ours["loading_s"], 2)}
            row |= {f"{name}_tokens_per_s": round(tokens / s, 1) for name, s in rates.items()}
            row |= {"busy_share": round(seconds / ours["busy_s"], 3), "wall_share": round(seconds / ours["wall_s"], 3)}
            row |= {"cpu_share": round(cpu / ours["cpu_s"], 3), "other_cpu": round(ours["other_cpu_s"] / ours["cpu_s"], 3)}
            line(row)
            rows.append(row)
        pipe.send(None)
        process.join()
    table(rows, tuple(rows[0]))
    whats = {
        "busy_share": "engine-busy second",
        "wall_share": "second from the first request to the last score",
        "cpu_share": "CPU second of the sampling process",
    }
    for name, what in whats.items():
        print(f"curation / generate, tokens per {what}: median {statistics.median(row[name] for row in rows):.3f}")
    print(f"CPU time of all others for one of the sampling process: median {statistics.median(row['other_cpu'] for row in rows):.3f}")


def cpu_s(pid: int) -> float:
    """CPU seconds of a process so far."""
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def curated(recipe: Any, expert: Any, folder: Path) -> dict[str, Any]:
    """One curation's sampling and scoring, on an engine of its own."""
    from data.journal import Journal
    from rewards.scorer import Scorer
    from rl.pool import RolloutPool
    from sft.sampling import Sampler

    folder.mkdir()
    asked: list[Any] = []
    first: list[float] = []
    cpu: list[dict[int, float]] = []
    engines: list[int] = []
    submit, close = RolloutPool.submit, RolloutPool.close

    def now() -> None:
        us = psutil.Process()
        cpu.append({process.pid: cpu_s(process.pid) for process in (us, *us.children(recursive=True))})

    def noting(pool: Any, requests: Any) -> None:
        if not first:
            engines.append(pool.engines[0].pid)
            now()
            first.append(time.perf_counter())
        asked.extend(requests)
        submit(pool, requests)

    def noting_close(pool: Any) -> None:
        now()
        close(pool)

    RolloutPool.submit, RolloutPool.close = noting, noting_close  # type: ignore[method-assign]
    try:
        with Journal(folder / "journal.sqlite") as journal, Scorer(recipe.rewards) as scorer:
            sampler = Sampler(journal, scorer, folder, 1.0, print)
            assert sampler.run([expert], 1)
            ended = time.perf_counter()
    finally:
        RolloutPool.submit, RolloutPool.close = submit, close  # type: ignore[method-assign]
    spent = sampler.spent["expert"]
    wall = sampler.scored_at - first[0]
    assert ended >= sampler.scored_at
    taken = {pid: seconds - cpu[0].get(pid, 0.0) for pid, seconds in cpu[-1].items()}
    sampling = taken.pop(engines[0])
    clocks = {"busy_s": spent.busy_s, "loading_s": spent.loading_s, "wall_s": wall, "cpu_s": sampling, "other_cpu_s": sum(taken.values())}
    return {"requests": asked, "tokens": spent.tokens, **clocks}


def bare(pipe: Connection, spec: Any) -> None:
    """A process with an `LLM`; answers requests with seconds and tokens."""
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
        max_num_batched_tokens=config.scheduler_config.max_num_batched_tokens, logprobs_mode="processed_logprobs",
        disable_log_stats=True, seed=0,
    )  # fmt: skip
    pipe.send(None)
    while (requests := pipe.recv()) is not None:
        prompts = [TokensPrompt(prompt_token_ids=request.prompt_ids.tolist()) for request in requests]
        params = [sampling_params(request) for request in requests]
        began = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        pipe.send((time.perf_counter() - began, sum(len(output.outputs[0].token_ids) for output in outputs)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    modes = parser.add_subparsers(dest="mode", required=True)
    killing = modes.add_parser("kills")
    killing.add_argument("--engine", choices=["hf", "vllm"], default="hf")
    killing.add_argument("--policy", type=Path, help="with vllm; its tokenizer has to know digits and '='")
    killing.add_argument("--kills", type=int, default=30)
    killing.add_argument("--prompts", type=int, default=40)
    killing.add_argument("--seed", type=int, default=0)
    sampling = modes.add_parser("busy")
    sampling.add_argument("policy", type=Path)
    sampling.add_argument("--prompts", type=int, default=400)
    sampling.add_argument("--group", type=int, default=4)
    sampling.add_argument("--slots", type=int, default=128)
    sampling.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    kills(arguments) if arguments.mode == "kills" else busy(arguments)


if __name__ == "__main__":
    main()

"""What kill tests share: a small run, ways to start and kill it, and what has to be the same as if it had not been killed.

A run is a process forked from one that has torch loaded and has done nothing else, so that a kill costs seconds; `started` runs the
real command.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from multiprocessing import forkserver, get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from crash import CHECKOUT, install
from safetensors.torch import load_file

import rl.open_run
import rl.train
from data.journal import Journal
from rl.metrics import without_times
from sft.init import init_policy

TINY = {
    "model_type": "qwen3_moe", "hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
}  # fmt: skip
PLUGIN = """
def digits(completions, log_metric=None, **columns):
    kinds = [ord(text[:1] or "0") % 8 for text in completions]
    if 1 in kinds:
        raise ValueError("cannot judge this one")  # some fail and some are not judged, so that groups are dropped and asked again
    log_metric("seen/letters", sum(map(len, completions)))
    return [None if kind in (3, 5) else sum(c.isdigit() for c in text) / 6 for kind, text in zip(kinds, completions)]
"""
LIMIT_S = 600
CHILDREN = get_context("forkserver")


def make_policy(folder: Path) -> Path:
    model, tokenizer = init_policy(TINY, "characters", seed=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_recipe(folder: Path, policy: Path, **sections: dict[str, Any]) -> Path:
    """A run of six steps with a checkpoint after every second, in `folder`; sections are updated with what is given."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plugin.py").write_text(PLUGIN)
    task = {"task": "arithmetic", "options": {"digits": 1}}
    values: dict[str, dict[str, Any]] = {
        "run": {"name": "run", "seed": 3, "output_dir": str(folder)},
        "policy": {"path": str(policy)},
        "prompts": dict(task),
        "rollout": {"engine": "hf", "group_size": 4, "max_tokens": 6},
        "rewards": {"plugins": [f"{folder / 'plugin.py'}:digits"], "parts": [{"name": "digits"}], "max_error_rate": 1.0, "workers": 1},
        "loss": {"mask_truncated": False},
        "learner": {"steps": 6, "prompts_per_step": 4, "lr": 3e-3, "warmup_steps": 0, "steps_per_batch": 2, "threads": 1},
        "eval": {"every": 3, "prompts": {**task, "split": "test", "limit": 5}, "samples": 2, "greedy": False},
        "checkpoint": {"every": 2, "keep": 2},
    }
    for name, changes in sections.items():
        values[name] |= changes
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(values))
    return path


def forked(recipe: Path, crash: str | None = None, kill_after_s: float | None = None) -> int:
    """Trains in a child, killed at a named point or after some seconds; the exit code, -9 if it was killed."""
    return in_child(train, recipe, crash, limit_s=LIMIT_S if kill_after_s is None else kill_after_s)


def in_child(function: Callable[..., None], *arguments: Any, limit_s: float = LIMIT_S) -> int:
    """Calls a function of an importable module in a forked child, killed after `limit_s`; the exit code."""
    _start_server()
    child = CHILDREN.Process(target=function, args=arguments)
    child.start()
    child.join(limit_s)
    child.kill()
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def _start_server() -> None:
    """The process that children are forked from, with this module loaded; it looks for it in PYTHONPATH alone."""
    CHILDREN.set_forkserver_preload(["killing"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (CHECKOUT, CHECKOUT / "tests"))))
        patch.setenv("TOKENIZERS_PARALLELISM", "false")  # or tokenizers says something at every fork
        forkserver.ensure_running()


def train(recipe: Path, crash: str | None = None) -> None:
    """`python -m rl.train RECIPE`, its output in a file beside the recipe; ends the process."""
    output = os.open(recipe.with_name("output.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if crash is not None:
        install(crash)
    sys.argv = ["rl.train", str(recipe)]
    sys.exit(rl.train.main())


def fill(disk: Path, left_bytes: int) -> None:
    """Leaves so much room on a disk, by a file in it."""
    room = os.statvfs(disk)
    fd = os.open(disk / "filler", os.O_CREAT | os.O_WRONLY)
    os.posix_fallocate(fd, 0, room.f_bavail * room.f_frsize - left_bytes)
    os.close(fd)


def train_on_a_disk_that_fills(recipe: Path, module: str, owner: str, name: str, call: int, left_bytes: int) -> None:
    """`train`; just before the n-th call of a method the disk that the recipe is on has only so much room left."""
    kind: Any = getattr(sys.modules[module], owner)
    real, calls = getattr(kind, name), iter(range(1, sys.maxsize))

    def filling(*arguments: Any, **named: Any) -> Any:
        if next(calls) == call:
            fill(recipe.parent, left_bytes)
        return real(*arguments, **named)

    setattr(kind, name, filling)
    train(recipe)


def command(recipe: Path, crash: str | None = None, ranks: int = 1) -> list[str]:
    """The real command, as people start it, or under `tests/crash.py`."""
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"] if ranks > 1 else []
    train = [str(CHECKOUT / "tests" / "crash.py"), crash, "rl.train"] if crash is not None else ["-m", "rl.train"]
    return [sys.executable, *launch, *train, str(recipe)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}


def started(recipe: Path, crash: str | None = None, ranks: int = 1, kill_after_s: float | None = None) -> int:
    """Trains by the real command; killed after some seconds, its own process alone is. The exit code of the command."""
    with open(recipe.with_name("output.log"), "ab") as output:
        process = subprocess.Popen(command(recipe, crash, ranks), cwd=CHECKOUT, env=environment(), stdout=output, stderr=output)
        try:
            process.wait(kill_after_s if kill_after_s is not None else LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
        return process.wait()


# --- what has to be the same ------------------------------------------------------------------------------------------


def differences(run: Path, whole: Path, bits: bool = True) -> list[str]:
    """What is not as in the run that nothing disturbed: weights, metrics, files of completions, what became of every group."""
    found = [problem for problem in account_problems(run) if problem]
    if not bits:
        return found
    if weights(run) != weights(whole):
        found.append("other weights")
    if rows(run) != rows(whole):
        found.append("other metrics")
    if fates(run) != fates(whole):
        found.append("other fates of groups")
    if files(run) != files(whole):
        found.append("other files of completions")
    return found


def weights(run: Path) -> dict[str, bytes]:
    tensors = load_file(run / "final" / "model.safetensors")
    return {name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


def rows(run: Path) -> list[dict[str, Any]]:
    return [without_times(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]


def files(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "completions").glob("*.parquet"))}


def fates(run: Path) -> list[tuple[Any, ...]]:
    """Group, step, reason, tokens, trained tokens, masked tokens of every live use."""
    with Journal(run / "journal.sqlite", read_only=True) as journal:
        query = """SELECT group_id, use.step, reason, tokens, trained, masked FROM use JOIN attempt ON attempt.key = use.attempt
                   WHERE void IS NULL ORDER BY 1"""
        return journal._db.execute(query).fetchall()


def account_problems(run: Path) -> list[str]:
    """What is wrong in the account of a finished run by itself: lost groups, groups trained twice, sums that are not the metrics'."""
    problems = []
    with Journal(run / "journal.sqlite", read_only=True) as journal:
        sums = journal.sums()
        steps = rows(run)[1:]
        if sums.open or sums.groups["open"]:
            problems.append(f"{sums.groups['open']} groups are open")
        live = journal._db.execute("SELECT count(*), count(DISTINCT attempt) FROM use WHERE void IS NULL").fetchone()
        if live[0] != live[1]:
            problems.append("a group is used twice")
        provisional = journal._db.execute("SELECT count(*) FROM use WHERE void IS NULL AND checkpoint IS NULL").fetchone()[0]
        if provisional:
            problems.append(f"{provisional} uses are in no checkpoint")
    for name in ("sampled", "trained"):
        metric = sum(row[f"tokens/{name}"] for row in steps)
        if getattr(sums, name) != metric and not (name == "sampled" and sums.sampled - metric == sums.wasted.get("resampled", 0)):
            problems.append(f"tokens/{name}: {metric} in the metrics, {getattr(sums, name)} in the journal")
    for reason, groups in sums.groups.items():
        if reason != "open" and groups != sum(row.get(f"groups/{reason}", 0) for row in steps):
            problems.append(f"groups/{reason}: not {groups} in the metrics")
    return problems


def voided(run: Path) -> int:
    """Uses that were made void, over all deaths."""
    with Journal(run / "journal.sqlite", read_only=True) as journal:
        return journal._db.execute("SELECT count(*) FROM use WHERE void IS NOT NULL").fetchone()[0]


def moments(count: int, seed: int, begin_s: float, end_s: float) -> Sequence[float]:
    """Random moments between two, sorted by nothing."""
    rng = random.Random(seed)
    return [rng.uniform(begin_s, end_s) for _ in range(count)]

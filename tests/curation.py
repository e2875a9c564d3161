"""Curations for tests and benchmarks: a small recipe on tiny policies, and a process that is killed and started again.

The process that is killed is forked from this one, so that a start costs no import. It notes every completion that it asks an engine
for and every one that it hands to the rewards, in a file that survives it.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from policies import tiny_qwen3_moe

from data.journal import Journal


def prompts_file(path: Path, count: int) -> Path:
    rows = [{"id": f"q{n}", "prompt": f"{n * 7919 % 100_000}=", "answer": str(n), "response": f"{n}4"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def small_recipe(folder: Path, prompts: int = 10, **changes: Any) -> dict[str, Any]:
    """Two experts of random weights in `folder`, asked the same prompts; a completion is right if it has one of three characters."""
    for seed in (1, 2):
        if not (folder / f"expert-{seed}").is_dir():
            tiny_qwen3_moe(folder / f"expert-{seed}", seed=seed)
    prompts_file(folder / "prompts.jsonl", prompts)
    experts = [
        {
            "name": name,
            "path": f"expert-{seed}",
            "prompts": {"path": "prompts.jsonl"},
            "rollout": {"engine": "hf", "group_size": 3, "max_tokens": 6},
        }
        for seed, name in ((1, "one"), (2, "two"))
    ]
    return {
        "run": {"name": "curation", "seed": 1},
        "experts": experts,
        "rewards": {"parts": [{"name": "regex", "options": {"pattern": "[0-4@A-F]"}}], "workers": 1},
        "select": {"rule": "all_correct", "pass_rate": [0.01, 0.99]},
        "clean": {"near": None, "cut_off": False},
        "pairs": {},
        "threads": 1,
    } | changes


def write_recipe(folder: Path, values: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    """What a curated data set is, byte for byte."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class Killed:
    """A curation in a process of its own, in `folder`, that may be killed at any moment."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.notes = folder / "asked.jsonl"
        self.notes.touch()

    def start(self) -> int:
        """Forks; the child ends with the command's exit code."""
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            code = 70
            try:
                code = self._run()
            finally:
                os._exit(code)
        return pid

    def _run(self) -> int:
        import sft.curate
        from rewards.scorer import Scorer
        from rl.pool import RolloutPool

        os.chdir(self.folder)
        with (self.folder / "log.txt").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        notes = self.notes.open("a", buffering=1)
        submit, score = RolloutPool.submit, Scorer.submit

        def noting_submit(pool: Any, requests: Any) -> None:
            asked = [request.id for request in requests]
            notes.write(json.dumps({"pid": os.getpid(), "at": time.monotonic(), "sampled": asked}) + "\n")
            submit(pool, requests)

        def noting_score(scorer: Any, key: Any, job: Any) -> None:
            notes.write(json.dumps({"pid": os.getpid(), "scored": str(key)}) + "\n")
            score(scorer, key, job)

        RolloutPool.submit, Scorer.submit = noting_submit, noting_score  # type: ignore[method-assign]
        sys.argv = ["sft.curate", str(self.folder / "recipe.yaml")]
        return sft.curate.main()

    def run_for(self, seconds: float, from_asked: bool = False) -> int | None:
        """Kills it after some seconds, or so long after it asked for its first completion; its exit code if it ended before."""
        before = self.notes.stat().st_size
        pid = self.start()
        deadline = None if from_asked else time.monotonic() + seconds
        while deadline is None or time.monotonic() < deadline:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            if deadline is None and self.notes.stat().st_size > before:
                deadline = time.monotonic() + seconds
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return None

    def held(self) -> tuple[set[str], set[str]]:
        """Completions and groups with scores that the journal holds now."""
        path = next(self.folder.glob("outputs/*/journal.sqlite"), None)
        if path is None:
            return set(), set()
        completions, scored = set(), set()
        with Journal(path, read_only=True) as journal:
            for (group,) in journal._db.execute("SELECT group_id FROM attempt").fetchall():
                completions |= {c.id for c in journal.completions(group).values()}
                if journal.scores(group):
                    scored.add(group)
        return completions, scored

    def asked_since(self, line: int) -> tuple[set[str], set[str], int]:
        """What was asked of engines and rewards after a line of the notes, and the number of lines now."""
        lines = [text for text in self.notes.read_text().splitlines(keepends=True) if text.endswith("\n")]
        notes = [json.loads(text) for text in lines[line:]]
        sampled = {name for note in notes for name in note.get("sampled", ())}
        return sampled, {note["scored"] for note in notes if "scored" in note}, len(lines)

"""Scoring goes on beside sampling: a group is scored when it is complete, whatever else is still being sampled."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from policies import character_tokenizer

from data.journal import Journal
from data.prompt_stream import PromptStream
from data.values import Completion, Prompt, Score
from rewards.job import ScoreJob
from rl.config import RolloutConfig
from rl.engines.base import Finished, Mailbox, Request
from rl.pool import RolloutPool
from rl.stream import GroupStream

GROUP = 2


class Engine:
    """Finishes a group when it is told to."""

    name, slots, whole_groups = "engine-0", 16, False

    def __init__(self) -> None:
        self.given: list[Request] = []

    def start(self, mailbox: Mailbox) -> None:
        self.mailbox = mailbox

    def submit(self, requests: Sequence[Request]) -> None:
        self.given.extend(requests)

    def finish_group(self) -> None:
        for r in self.given[:GROUP]:
            tokens = np.array([2 + r.index], np.int32)
            one = np.ones(1, np.uint8)
            logp, version = np.array([-1.0], np.float32), np.zeros(1, np.int32)
            completion = Completion(r.prompt_id, r.group_id, r.index, r.attempt, r.seed, tokens, one, logp, version, "stop", self.name)
            self.mailbox.put(Finished(self.name, completion))
        del self.given[:GROUP]

    def close(self) -> None: ...


class Scorer:
    """Scores at once, notes how many completions are in the engine at that time, and only then lets it finish the next group."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.sampling: list[int] = []
        self.done: list[tuple[str, list[Score]]] = []

    def submit(self, key: str, job: ScoreJob) -> None:
        self.sampling.append(len(self.engine.given))
        self.done.append((key, [Score(float(i)) for i in range(len(job.completions))]))
        self.engine.finish_group()

    def poll(self, timeout_s: float) -> list[tuple[str, list[Score]]]:
        done, self.done = self.done, []
        return done

    def logged(self, key: str) -> list[tuple[str, float]]:
        return []

    def metrics(self) -> dict[str, float]:
        return {}


def test_a_group_is_scored_while_others_are_sampled(tmp_path: Path) -> None:
    engine = Engine()
    scorer = Scorer(engine)
    prompts = [Prompt(f"p{n}", "1", "1", np.array([3], np.int32)) for n in range(4)]
    config = RolloutConfig(engine="hf", group_size=GROUP)
    with Journal(tmp_path / "journal.sqlite") as journal, RolloutPool([engine]) as pool:
        submit = pool.submit

        def submit_and_finish_the_first(requests: Sequence[Request]) -> None:
            submit(requests)
            if len(engine.given) == 4 * GROUP:
                engine.finish_group()

        pool.submit = submit_and_finish_the_first  # type: ignore[method-assign]
        stream = GroupStream(
            PromptStream(prompts, 0), pool, scorer, journal, character_tokenizer(64), config, run="r", seed=0, max_error_rate=0.0
        )
        assert len(stream.next(4)) == 4
        assert scorer.sampling == [6, 4, 2, 0]
        assert stream.numbers["engines/alive"] == 1 and stream.numbers["completions/length_bias"] == 1.0

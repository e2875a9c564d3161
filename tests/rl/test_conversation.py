"""Conversations: several turns and tools, by an engine that answers from a table, and by the hf engine."""

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.journal import Journal, Slot
from data.journal_sums import FAILED
from data.prompt_stream import PromptStream
from data.values import Completion, Group, Prompt, Score
from rewards.job import ScoreJob
from rewards.worker import import_function
from rl.config import RolloutConfig
from rl.conversation import turn_seed
from rl.conversation_pool import ConversationPool
from rl.engines.base import Died, Finished, Health, Mailbox, Request, Sampling, WeightChunk
from rl.metrics import turn_metrics, turns
from rl.replay import with_routes
from rl.stream import GroupStream, RunStopped
from sft.init import build_tokenizer

CHECKOUT = Path(__file__).resolve().parents[2]
TOKENIZER = build_tokenizer("characters")
CALCULATOR = import_function(str(CHECKOUT / "recipes" / "tools" / "calculator.py"), "calculator")
SCRIPT = {"2+3=": "<think><calc>2+3</calc>", "2+3=<think><calc>2+3</calc>5": "</think><answer>5</answer>\0", "9=": "9\0"}
"""What the policy writes after what; \\0 is the end of text."""


def ids(text: str) -> list[int]:
    end = TOKENIZER.eos_token_id
    return [*TOKENIZER(text.rstrip("\0"), add_special_tokens=False)["input_ids"], *([end] if text.endswith("\0") else [])]


class ScriptEngine:
    """Writes what the script says, at most max_tokens of it; token n of a turn has log-prob -n - the version."""

    whole_groups = False
    slots = 8

    def __init__(self, script: dict[str, str], deaths: int = 0, routes: bool = False):
        self.name = "engine-0"
        self.script = script
        self.deaths = deaths
        self.routes = routes
        self.seen: list[Request] = []

    def start(self, mailbox: Mailbox) -> None:
        self.mailbox = mailbox

    def submit(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.seen.append(request)
            if self.deaths and len(self.seen) == 2:
                self.deaths -= 1
                self.mailbox.put(Died(self.name, "killed"))
                return
            self.mailbox.put(Finished(self.name, self.write(request)))

    def write(self, r: Request) -> Completion:
        assert r.prompt is None
        wanted = ids(self.script[TOKENIZER.decode(r.prompt_ids)])
        written = wanted[: r.sampling.max_tokens]
        n = len(written)
        completion = Completion(
            r.prompt_id, r.group_id, r.index, r.attempt, r.seed, np.array(written, np.int32), np.ones(n, np.uint8),
            -np.arange(n, dtype=np.float32) - r.attempt, np.full(n, len(self.seen), np.int32),
            "stop" if n == len(wanted) else "length", self.name,
        )  # fmt: skip
        if self.routes:  # a position's expert is the number of the turn that forwarded it
            positions = len(r.prompt_ids) + n - 1
            completion = with_routes(completion, np.full((positions, 1, 1), len(self.seen), np.uint8))
        return completion

    def abort(self, ids: Sequence[str]) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def begin_update(self, version: int) -> None: ...
    def load(self, chunk: WeightChunk) -> None: ...
    def end_update(self) -> None: ...
    def close(self) -> None: ...
    def health(self) -> Health:
        return Health(True, 0, 0, 0, 0.0)

    def last_words(self) -> str:
        return ""


def request(text: str, index: int = 0, max_tokens: int = 64) -> Request:
    prompt_ids = np.array(ids(text), np.int32)
    prompt = Prompt(text, text, text, prompt_ids, {"answer": "5"})
    return Request(text, f"run/{text}/0", 0, index, 100 + index, prompt_ids, Sampling(max_tokens), 0, prompt)


def converse(function: Any, requests: Sequence[Request], engine: Any = None, timeout_s: float = 5.0) -> dict[int, Completion]:
    """Completions by index."""
    found: dict[int, Completion] = {}
    pool = ConversationPool([engine or ScriptEngine(SCRIPT)], function, "tool", TOKENIZER, timeout_s=timeout_s)
    with pool:
        pool.collect([requests], lambda c: found.update({c.index: c}))
        assert pool.open == 0 and not pool._turns and not super(ConversationPool, pool).open
    return found


def test_a_completion_is_its_turns_with_what_the_tool_wrote_between_them() -> None:
    engine = ScriptEngine(SCRIPT)
    done = converse(CALCULATOR, [request("2+3=")], engine)[0]
    first, second = ids("<think><calc>2+3</calc>"), ids("</think><answer>5</answer>\0")
    assert done.token_ids.tolist() == [*first, *ids("5"), *second]
    assert done.mask.tolist() == [1] * len(first) + [0] + [1] * len(second)
    logp = [*(-np.arange(len(first))), np.nan, *(-np.arange(len(second)))]
    assert np.array_equal(done.engine_logp, np.array(logp, np.float32), equal_nan=True)
    assert done.policy_version.tolist() == [1] * (len(first) + 1) + [2] * len(second)
    assert (done.finish_reason, done.seed, done.id, done.failed) == ("stop", 100, "run/2+3=/0#0", None)
    # Each turn goes on from all there was, with a seed of its own and what room is left.
    assert [TOKENIZER.decode(r.prompt_ids) for r in engine.seen] == ["2+3=", "2+3=<think><calc>2+3</calc>5"]
    assert [r.seed for r in engine.seen] == [100, turn_seed(100, 1)] and turn_seed(100, 1) not in (100, turn_seed(101, 1))
    assert [r.sampling.max_tokens for r in engine.seen] == [64, 64 - len(first) - 1]
    assert {len(r.prompt_ids) + r.sampling.max_tokens for r in engine.seen} == {4 + 64}  # what engines are built for
    assert [r.sampling.stop for r in engine.seen] == [("</calc>",)] * 2
    assert turns(done) == 2


def test_routes_are_those_by_which_each_token_was_sampled() -> None:
    done = converse(CALCULATOR, [request("2+3=")], ScriptEngine(SCRIPT, routes=True))[0]
    prompt, first = len(ids("2+3=")), len(ids("<think><calc>2+3</calc>"))
    assert done.routes is not None and done.routes_valid is not None
    # The last token of the first turn and the tool's are forwarded by the second turn alone; the completion's last one by none.
    assert done.routes[:, 0, 0].tolist() == [1] * (prompt + first - 1) + [2] * (len(done.token_ids) - first) + [0]
    assert done.routes_valid.tolist() == [True] * (prompt + len(done.token_ids) - 1) + [False]


def test_a_completion_has_no_more_than_max_tokens_whoever_wrote_them() -> None:
    first = len(ids("<think><calc>2+3</calc>"))
    at_tool = converse(CALCULATOR, [request("2+3=", max_tokens=first)])[0]  # no room for what the tool says
    assert (len(at_tool.token_ids), at_tool.finish_reason, at_tool.mask.all()) == (first, "length", True)
    after_tool = converse(CALCULATOR, [request("2+3=", max_tokens=first + 1)])[0]  # none for the turn after it
    assert (len(after_tool.token_ids), after_tool.finish_reason, after_tool.mask[-1]) == (first + 1, "length", 0)
    in_turn = converse(CALCULATOR, [request("2+3=", max_tokens=first + 4)])[0]
    assert (len(in_turn.token_ids), in_turn.finish_reason, in_turn.mask[-1]) == (first + 4, "length", 1)


def test_an_engine_that_dies_between_two_turns_changes_nothing() -> None:
    engine = ScriptEngine(SCRIPT, deaths=1)
    done, undisturbed = converse(CALCULATOR, [request("2+3=")], engine)[0], converse(CALCULATOR, [request("2+3=")])[0]
    assert done.token_ids.tolist() == undisturbed.token_ids.tolist() and done.mask.tolist() == undisturbed.mask.tolist()
    assert [r.seed for r in engine.seen] == [100, turn_seed(100, 1), turn_seed(100, 1)]


# --- what goes wrong --------------------------------------------------------------------------------------------------


async def plain(generate: Any, prompt: Prompt) -> Any:
    turn = await generate()
    return turn.token_ids, [1] * len(turn.token_ids)


def broken(how: Callable[[list[int]], Any]) -> Any:
    """A function that returns what `how` makes of the policy's turn."""

    async def function(generate: Any, prompt: Prompt) -> Any:
        return how((await generate()).token_ids)

    return function


async def raises(generate: Any, prompt: Prompt) -> Any:
    await generate()
    raise KeyError("no such tool")


async def exits(generate: Any, prompt: Prompt) -> Any:
    raise SystemExit(3)


async def rewrites(generate: Any, prompt: Prompt) -> Any:
    turn = await generate()
    return await generate([turn.token_ids[0] + 1, *turn.token_ids[1:]])


async def two_at_once(generate: Any, prompt: Prompt) -> Any:
    return await asyncio.gather(generate(), generate())


async def strange_token(generate: Any, prompt: Prompt) -> Any:
    return await generate([10_000])


NONSENSE = [
    (raises, "KeyError: 'no such tool' (", "test_conversation.py:"),
    (exits, "SystemExit: 3", ""),
    (rewrites, "its token ids are not those that were sampled: of 2 so far, the one at 0", ""),
    (two_at_once, "generate was called while a turn was being sampled", ""),
    (strange_token, "it appended token 10000; the tokenizer knows 0 to 102", ""),
    (broken(lambda t: None), "it returned NoneType None", ""),
    (broken(lambda t: ("9", [1])), "TypeError", ""),
    (broken(lambda t: (t[:-1], [1] * len(t[:-1]))), "of 2 so far, the one at 1 is another or missing", ""),
    (broken(lambda t: (t, [1, 0])), "its mask has 2 entries for 2 tokens, or is wrong at 1", ""),
    (broken(lambda t: ([*t, 5], [1] * 3)), "is wrong at 2", ""),
    (broken(lambda t: (t, [1])), "its mask has 1 entries for 2 tokens, or is wrong at 1", ""),
]


@pytest.mark.parametrize(("function", "said", "also"), NONSENSE)
def test_a_function_that_raises_or_returns_nonsense_fails_its_completion(function: Any, said: str, also: str) -> None:
    done = converse(function, [request("9=")])[0]
    assert done.failed is not None and done.failed.value is None and done.failed.status == "error"
    assert done.failed.detail.startswith("rollout.conversation tool: ") and said in done.failed.detail and also in done.failed.detail
    assert done.finish_reason == "abort" and "\n" not in done.failed.detail


async def returns_unasked(generate: Any, prompt: Prompt) -> Any:
    return [], []


def test_a_completion_without_a_turn_is_none() -> None:
    failed = converse(returns_unasked, [request("9=")])[0].failed
    assert failed is not None and "without a turn of the policy" in failed.detail


HANGS = ("waits", "blocks", "holds on")


@pytest.mark.parametrize("how", HANGS)
def test_a_function_that_hangs_fails_its_own_completion_and_no_other(how: str) -> None:
    async def function(generate: Any, prompt: Prompt) -> Any:
        turn = await generate()
        if prompt.text == "2+3=" and turn.token_ids:
            await asyncio.sleep(0.2)  # the others are under way
            while True:
                try:
                    time.sleep(3600) if how == "blocks" else await asyncio.sleep(3600 if how == "waits" else 0.2)
                except asyncio.CancelledError:
                    if how == "waits":
                        raise
        else:
            await asyncio.sleep(0.3)
        return turn.token_ids, [1] * len(turn.token_ids)

    began = time.monotonic()
    done = converse(function, [request("2+3=", 0), *(request("9=", i) for i in (1, 2, 3))], timeout_s=1.5)
    assert time.monotonic() - began < 15.0
    assert [done[i].failed.status if done[i].failed else "ok" for i in range(4)] == ["timeout", "ok", "ok", "ok"]
    assert done[0].failed is not None and "1.5 s" in done[0].failed.detail
    assert all(done[i].token_ids.tolist() == ids("9\0") for i in (1, 2, 3))


def test_what_engines_take_is_no_fault_of_the_function() -> None:
    class Slow(ScriptEngine):
        def submit(self, requests: Sequence[Request]) -> None:
            time.sleep(0.4)
            super().submit(requests)

    assert converse(CALCULATOR, [request("2+3=")], Slow(SCRIPT), timeout_s=0.3)[0].failed is None


async def impatient(generate: Any, prompt: Prompt) -> Any:
    await asyncio.wait_for(generate(), 0.05)


def test_a_turn_that_nobody_waits_for_has_come_back_before_its_completion_is_handed_out() -> None:
    """Engines are to be idle then: they are given new weights."""

    class Late(ScriptEngine):
        def submit(self, requests: Sequence[Request]) -> None:
            self.late = requests

    engine = Late(SCRIPT)
    with ConversationPool([engine], impatient, "tool", TOKENIZER, timeout_s=5.0) as pool:
        pool.submit([request("9=")])
        assert pool.poll(0.5) == [] and pool.open == 1
        ScriptEngine.submit(engine, engine.late)
        (done,) = pool.poll(5.0)
        assert done.failed is not None and "TimeoutError" in done.failed.detail and done.failed.status == "error"
        assert pool.metrics()["tokens/lost"] == 2


# --- in a step --------------------------------------------------------------------------------------------------------


class Judge:
    """Gives each completion that it is shown its length; notes what it was shown."""

    def __init__(self) -> None:
        self.shown: list[ScoreJob] = []
        self.done: list[tuple[str, list[Score]]] = []

    def submit(self, key: str, job: ScoreJob) -> None:
        self.shown.append(job)
        self.done.append((key, [Score(float(len(text))) for text in job.completions]))

    def poll(self, timeout_s: float) -> list[tuple[str, list[Score]]]:
        done, self.done = self.done, []
        return done

    def logged(self, key: str) -> list[tuple[str, float]]:
        return []

    def extras(self, key: str) -> dict[str, list[Any]]:
        return {"note": [text[:1] for text in self.shown[0].completions]}

    def metrics(self) -> dict[str, float]:
        return {}

    def explain(self, scores: Sequence[Score]) -> str:
        return f"{scores[0].status}: {scores[0].detail}"


def stream_of(function: Any, folder: Path, max_error_rate: float) -> tuple[GroupStream, ConversationPool, Journal]:
    pool = ConversationPool([ScriptEngine(SCRIPT)], function, "tool", TOKENIZER, timeout_s=5.0)
    config = RolloutConfig(group_size=4, max_tokens=64, max_resamples=1, conversation=f"{__file__}:plain")
    prompt, journal = request("2+3=").prompt, Journal(folder / "journal.sqlite")
    assert prompt is not None
    stream = GroupStream(
        PromptStream([prompt], 0), pool, Judge(), journal, TOKENIZER, config, run="run", seed=0, max_error_rate=max_error_rate
    )
    return stream, pool, journal


def test_a_failed_completion_is_not_judged_and_its_siblings_are(tmp_path: Path) -> None:
    calls: list[int] = []

    async def third_fails(generate: Any, prompt: Prompt) -> Any:
        calls.append(len(calls))
        mine = calls[-1]
        ids, mask = await CALCULATOR(generate, prompt)
        assert prompt.columns == {"answer": "5"}
        return None if mine == 2 else (ids, mask)

    stream, pool, journal = stream_of(third_fails, tmp_path, max_error_rate=0.25)
    with journal, pool:
        (group,) = stream.next(1)
        assert [s.status for s in group.scores].count("ok") == 3
        bad = next(i for i, s in enumerate(group.scores) if s.value is None)
        assert group.scores[bad] == group.completions[bad].failed and "it returned NoneType None" in group.scores[bad].detail
        (job,) = stream.scorer.shown  # type: ignore[attr-defined]
        assert [len(job.completions), len(job.completion_ids), len(job.completion_masks)] == [3, 3, 3]
        assert job.completion_masks[0].tolist() == group.completions[bad - 1].mask.tolist()
        extras = stream.extras(group)["note"]
        assert extras[bad] is None and [x for x in extras if x] == ["<"] * 3
        assert (stream.numbers["conversation/failed"], stream.numbers["conversation/turns"]) == (1, 2.0)
        assert stream.numbers["tokens/sampled"] == journal.sums().sampled
        assert len(journal.completions(group.id)) == 3 and len(journal.scores(group.id)) == 4


def test_too_many_failures_of_a_tool_stop_the_run_and_name_it(tmp_path: Path) -> None:
    stream, pool, journal = stream_of(raises, tmp_path, max_error_rate=0.5)
    with journal, pool, pytest.raises(RunStopped, match=r"rewards.max_error_rate.*rollout.conversation tool: KeyError"):
        stream.next(1)
    # A step in which all may fail ends as well.
    (tmp_path / "again").mkdir()
    stream, pool, journal = stream_of(raises, tmp_path / "again", max_error_rate=1.0)
    with (
        journal,
        pool,
        pytest.raises(RunStopped, match=r"none of 1 groups got two scores, in 2 attempts each; error: rollout"),
    ):
        stream.next(1)


# --- the account ------------------------------------------------------------------------------------------------------


def test_a_failed_completion_is_waste_and_stays_to_be_asked_again(tmp_path: Path) -> None:
    done = [converse(raises, [request("9=")])[0], converse(plain, [request("9=", 1)])[1]]
    with Journal(tmp_path / "journal.sqlite") as journal:
        journal.begin([Slot("run", 0, "9=")], 2)
        journal.put_completions(done)
        assert list(journal.completions("run/9=/0")) == [1]
        assert dict(journal.sums().wasted)[FAILED] == 2 and journal.sums().sampled == 4


def test_metrics_count_turns_and_what_tools_wrote() -> None:
    both = (converse(CALCULATOR, [request("2+3=")])[0], converse(raises, [request("9=", 1)])[1])
    group = Group("g", request("9=").prompt, 0, both, (Score(1.0), both[1].failed))  # type: ignore[arg-type]
    assert turn_metrics([group]) == {"conversation/turns": 1.5, "conversation/tool_tokens": 0.5, "conversation/failed": 1}

"""The pool with engines that are tables: who gets what, and what becomes of it when they die."""

import time
from collections.abc import Sequence

import numpy as np
import pytest

import rl.engines.lives
from data.values import Completion
from rl.engines.base import Died, EngineDead, Finished, Health, Mailbox, Pulse, Request, Sampling, WeightChunk
from rl.engines.lives import Seat
from rl.pool import DEATHS, REASKS, RolloutPool


class TableEngine:
    """Answers when told to; keeps what it was given."""

    def __init__(self, name: str, slots: int = 4, whole_groups: bool = False):
        self.name = name
        self.slots = slots
        self.whole_groups = whole_groups
        self.given: list[Request] = []
        self.calls: list[int] = []
        self.closed = False
        self.gone = False
        self.starts = 0

    def start(self, mailbox: Mailbox) -> None:
        self.given, self.calls = [], []
        self.closed = self.gone = False
        self.starts += 1
        self.mailbox = mailbox

    def submit(self, requests: Sequence[Request]) -> None:
        if self.gone:
            raise EngineDead(f"engine {self.name} is gone")
        self.given.extend(requests)
        self.calls.append(len(requests))

    def finish(self, count: int, logp: float = -1.0) -> None:
        for r in self.given[:count]:
            self.mailbox.put(Finished(self.name, completion(r, self.name, logp)))
        del self.given[:count]

    def pulse(self, tokens: int = 0, paused: bool = False) -> None:
        self.mailbox.put(Pulse(self.name, Health(True, len(self.given), 0, tokens, 0.0, paused)))

    def die(self, reason: str = "killed by SIGKILL\nlast lines: out of memory") -> None:
        self.gone = True
        self.mailbox.put(Died(self.name, reason))

    def abort(self, ids: Sequence[str]) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def begin_update(self, version: int) -> None: ...
    def load(self, chunk: WeightChunk) -> None: ...
    def end_update(self) -> None: ...
    def health(self) -> Health:
        return Health(True, len(self.given), 0, 0, 0.0)

    def last_words(self) -> str:
        return "last lines: nothing of note"

    def close(self) -> None:
        self.closed = True


def completion(r: Request, engine: str, logp: float = -1.0) -> Completion:
    """One token."""
    one = np.ones(1)
    return Completion(
        r.prompt_id, r.group_id, r.index, r.attempt, r.seed, one.astype(np.int32), one.astype(np.uint8),
        (logp * one).astype(np.float32), 0 * one.astype(np.int32), "stop", engine,
    )  # fmt: skip


def requests(position: int, size: int) -> list[Request]:
    prompt = np.array([1], np.int32)
    return [Request(f"p{position}", f"g{position}", 0, i, i, prompt, Sampling(4), position) for i in range(size)]


def test_engines_are_kept_full_and_no_fuller() -> None:
    a, b = TableEngine("a", slots=4), TableEngine("b", slots=4)
    with RolloutPool([a, b]) as pool:
        for position in range(4):
            pool.submit(requests(position, 4))
        assert (len(a.given), len(b.given), len(pool.waiting)) == (5, 5, 6)
        a.finish(3)
        assert len(pool.poll(1.0)) == 3
        assert (len(a.given), len(b.given), len(pool.waiting)) == (5, 5, 3)
        for _ in range(10):
            a.finish(5)
            b.finish(5)
            pool.poll(0.1)
        assert pool.open == 0
    assert a.closed and b.closed


def test_engines_have_a_second_batch_waiting_where_there_is_plenty_for_all() -> None:
    a, b = TableEngine("a", slots=4), TableEngine("b", slots=4)
    with RolloutPool([a, b]) as pool:
        for position in range(10):
            pool.submit(requests(position, 4))
        assert (len(a.given), len(b.given), len(pool.waiting)) == (8, 8, 24)
        for expected in ((8, 8, 8), (4, 4, 0)):  # the end is shared evenly
            a.finish(8)
            b.finish(8)
            assert len(pool.poll(0.1)) == 16
            assert (len(a.given), len(b.given), len(pool.waiting)) == expected


def test_whole_groups_go_by_position_and_are_never_split() -> None:
    engines = [TableEngine(n, slots=2, whole_groups=True) for n in ("a", "b", "c")]
    with RolloutPool(engines) as pool:
        for position in (4, 5, 6, 7):
            pool.submit(requests(position, 6))
        assert [[r.position for r in e.given[::6]] for e in engines] == [[6], [4, 7], [5]]
        assert all(call == 6 for e in engines for call in e.calls)


def test_the_same_completion_is_not_asked_twice() -> None:
    with RolloutPool([TableEngine("a")]) as pool:
        pool.submit(requests(0, 2))
        with pytest.raises(AssertionError, match="g0#0 was asked for twice"):
            pool.submit(requests(0, 2))


def test_if_one_engine_does_not_start_the_others_are_closed() -> None:
    class Broken(TableEngine):
        def start(self, mailbox: Mailbox) -> None:
            raise EngineDead("engine b: no such folder")

    a, b = TableEngine("a"), Broken("b")
    with pytest.raises(EngineDead, match="no such folder"), RolloutPool([a, b]):
        pass
    assert a.closed and b.closed


# --- deaths -----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rl.engines.lives, "BACKOFF_s", 0.001)


def poll_until(pool: RolloutPool, condition: object, limit_s: float = 5.0) -> list[str]:
    """Polls until `condition()` holds; ids of what came."""
    ids: list[str] = []
    deadline = time.monotonic() + limit_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        ids += [c.id for c in pool.poll(0.01)]
    return ids


def alive(pool: RolloutPool) -> int:
    return int(pool.metrics()["engines/alive"])


def test_what_a_dead_engine_had_is_asked_again_by_the_same_requests() -> None:
    a, b = TableEngine("a", slots=4), TableEngine("b", slots=8)
    said: list[str] = []
    with RolloutPool([a, b], say=said.append) as pool:
        asked = requests(0, 12)
        pool.submit(asked)
        lost = list(a.given)
        a.finish(1)
        assert (len(lost), len(b.given)) == (5, 7)
        first = pool.poll(1.0)
        a.die()
        poll_until(pool, lambda: len(said) == 2)
        assert said == ["engine a died, 4 completions are asked again: killed by SIGKILL", "engine a is back"]
        assert a.starts == 2
        again = a.given + b.given[7:]
        assert sorted(map(id, again)) == sorted(map(id, lost[1:]))  # the very requests: attempt and seed with them
        a.finish(5)
        b.finish(12)
        rest = poll_until(pool, lambda: pool.open == 0)
        assert sorted([first[0].id, *rest]) == sorted(r.id for r in asked)
        assert pool.metrics() == {"engines/alive": 2, "engines/restarts": 1, "engines/reasked": 4, "tokens/lost": 0}
        assert pool.metrics() == {"engines/alive": 2, "engines/restarts": 0, "engines/reasked": 0, "tokens/lost": 0}


def test_what_a_dead_life_still_says_is_not_taken() -> None:
    a, b = TableEngine("a"), TableEngine("b")
    with RolloutPool([a, b]) as pool:
        pool.submit(requests(0, 2))
        late = Finished("a", completion(a.given[0], "a"))
        grave = a.mailbox
        a.die()
        poll_until(pool, lambda: a.starts == 2 and alive(pool) == 2)
        grave.put(late)
        grave.put(Died("a", "a second time"))
        assert pool.poll(0.05) == [] and pool.open == 2
        b.finish(2)
        assert sorted(c.id for c in pool.poll(1.0)) == ["g0#0", "g0#1"]
        assert a.starts == 2


def test_an_engine_that_is_alone_gets_its_work_again_when_it_has_the_current_weights() -> None:
    engine = TableEngine("a")
    given_at_catch_up: list[int] = []
    with RolloutPool([engine]) as pool:
        pool.catch_up = lambda engine: given_at_catch_up.append(len(engine.given))
        pool.submit(requests(0, 3))
        engine.die()
        pool.poll(0.0)
        pool.submit(requests(1, 1))  # nobody is there to take it
        poll_until(pool, lambda: len(engine.given) == 4)
        assert [r.group_id for r in engine.given] == ["g0", "g0", "g0", "g1"]
        assert given_at_catch_up == [0]
        engine.finish(4)
        assert len(pool.poll(1.0)) == 4


def test_an_engine_that_dies_unseen_loses_nothing_that_is_given_to_it_after() -> None:
    engine = TableEngine("a")
    with RolloutPool([engine]) as pool:
        engine.die()  # between two steps: nobody polls
        pool.submit(requests(0, 3))
        poll_until(pool, lambda: len(engine.given) == 3)
        engine.finish(3)
        assert len(pool.poll(1.0)) == 3


def test_a_whole_group_is_asked_again_and_what_was_taken_of_it_is_not_taken_twice() -> None:
    a, b = (TableEngine(name, whole_groups=True) for name in ("a", "b"))
    with RolloutPool([a, b]) as pool:
        pool.submit(requests(0, 4))
        pool.submit(requests(1, 4))
        assert (len(a.given), len(b.given)) == (4, 4)
        a.finish(1)
        assert [c.id for c in pool.poll(1.0)] == ["g0#0"]
        a.die()
        pool.poll(0.0)
        assert b.calls == [4, 4] and [r.id for r in b.given[4:]] == [f"g0#{i}" for i in range(4)]
        b.finish(8)
        assert [c.id for c in pool.poll(1.0)] == [f"g1#{i}" for i in range(4)] + ["g0#1", "g0#2", "g0#3"]
        assert pool.open == 0 and pool.metrics()["tokens/lost"] == 1
        poll_until(pool, lambda: alive(pool) == 2)
        pool.submit(requests(2, 4))
        assert len(a.given) == 4  # places are kept


def test_tokens_of_a_dead_engine_are_lost_as_far_as_it_had_told_of_them() -> None:
    a, b = TableEngine("a"), TableEngine("b")
    with RolloutPool([a, b]) as pool:
        pool.submit(requests(0, 4))
        a.finish(1)
        a.pulse(tokens=11)
        b.die()  # had told nothing
        a.die()
        pool.poll(0.1)
        assert pool.metrics()["tokens/lost"] == 10


def test_an_engine_that_says_nothing_is_started_again() -> None:
    engine = TableEngine("a")
    said: list[str] = []
    with RolloutPool([engine], stall_s=0.3, say=said.append) as pool:
        pool.submit(requests(0, 2))
        for _ in range(4):
            time.sleep(0.15)
            engine.pulse()
            pool.poll(0.0)
        assert said == []
        began = time.monotonic()
        poll_until(pool, lambda: engine.starts == 2 and len(engine.given) == 2)
        assert 0.2 < time.monotonic() - began < 2.0
        assert said[0].startswith("engine a died, 2 completions are asked again: hung: no token for 0.")


def test_silence_is_no_hang_of_an_engine_that_is_idle_paused_or_has_a_long_prompt_to_read() -> None:
    engine = TableEngine("a")
    with RolloutPool([engine]) as pool:
        seat: Seat = pool._seats[0]
        assert seat.silence(time.monotonic() + 1e6, stall_s=60) is None
        pool.submit(requests(0, 2))
        now = time.monotonic()
        assert seat.silence(now + 59, stall_s=60) is None
        assert seat.silence(now + 61, stall_s=60) == pytest.approx(61, abs=0.1)
        engine.pulse(paused=True)
        pool.poll(0.0)
        assert seat.silence(now + 1e6, stall_s=60) is None
        engine.pulse()
        pool.poll(0.0)
        assert seat.silence(now + 62, stall_s=60) is not None
        pool.submit([Request("p1", "g1", 0, 0, 0, np.ones(4096, np.int32), Sampling(4), 1)])
        assert seat.silence(now + 179, stall_s=60) is None
        assert seat.silence(now + 181, stall_s=60) is not None


@pytest.mark.parametrize("logp", [np.nan, -np.inf])
def test_log_probs_that_are_no_numbers_end_the_engine_and_are_not_taken(logp: float) -> None:
    a, b = TableEngine("a"), TableEngine("b")
    said: list[str] = []
    with RolloutPool([a, b], say=said.append) as pool:
        pool.submit(requests(0, 8))
        assert (len(a.given), len(b.given)) == (5, 3)
        a.finish(1)
        a.finish(1, logp)
        a.finish(3)  # of a broken engine, and no better
        assert [c.id for c in pool.poll(0.1)] == ["g0#0"]
        assert a.starts == 2
        assert said[0] == "engine a died, 4 completions are asked again: gave log-probs that are no numbers, for g0#1"
        poll_until(pool, lambda: len(a.given) + len(b.given) == 7)


def test_an_engine_that_keeps_dying_ends_the_run_with_its_last_words() -> None:
    class Mortal(TableEngine):
        def submit(self, requests: Sequence[Request]) -> None:
            super().submit(requests)
            if self.starts > 1:
                self.die()

    engine = Mortal("engine-7")
    with RolloutPool([engine]) as pool:
        pool.submit(requests(0, 3))
        engine.finish(1)
        pool.poll(1.0)
        engine.die()
        with pytest.raises(EngineDead, match=f"engine-7 died {DEATHS} times without finishing.*killed by SIGKILL\nlast lines: out of mem"):
            poll_until(pool, lambda: False)
        assert engine.starts == DEATHS


def test_a_wait_before_a_restart_doubles_with_each_death_in_a_row() -> None:
    waits: list[float] = []
    seat = Seat(TableEngine("a"), None)  # type: ignore[arg-type]
    seat._begin_again = lambda mailbox, delay_s, catch_up: waits.append(delay_s)  # type: ignore[method-assign]
    for _ in range(4):
        seat.end()
        seat.restart(lambda engine: None)
        seat._restart.join()  # type: ignore[union-attr]
    assert waits == [0.0, 0.001, 0.002, 0.004]


def test_an_engine_that_cannot_be_started_again_ends_the_run() -> None:
    class Once(TableEngine):
        def start(self, mailbox: Mailbox) -> None:
            if self.starts:
                self.starts += 1
                raise EngineDead(f"engine {self.name}: no memory left")
            super().start(mailbox)

    engine = Once("a")
    with RolloutPool([engine]) as pool:
        pool.submit(requests(0, 1))
        engine.die()
        with pytest.raises(EngineDead, match=r"died 5 times without finishing a completion, .*started again: engine a: no memory left"):
            poll_until(pool, lambda: False)
        assert engine.starts == DEATHS


def test_a_completion_that_is_there_at_every_death_ends_the_run() -> None:
    engine = TableEngine("a", slots=2)
    with RolloutPool([engine]) as pool:
        pool.submit(requests(0, 1))
        with pytest.raises(EngineDead, match=f"completion g0#0 was unfinished at {REASKS} deaths of engines"):
            for n in range(1, 20):
                pool.submit(requests(n, 1))
                poll_until(pool, lambda: len(engine.given) == 2)
                engine.given.reverse()
                engine.finish(1)  # the other one: so it is not the engine
                pool.poll(1.0)
                engine.die()
                pool.poll(0.0)
        assert engine.starts == REASKS


def test_a_pool_that_closes_ends_an_engine_that_is_about_to_start_again() -> None:
    class Slow(TableEngine):
        def start(self, mailbox: Mailbox) -> None:
            super().start(mailbox)
            deadline = time.monotonic() + 5
            while self.starts > 1 and not self.closed and time.monotonic() < deadline:
                time.sleep(0.01)

    engine = Slow("a")
    with RolloutPool([engine]) as pool:
        engine.die()
        pool.poll(0.05)
        poll_until(pool, lambda: engine.starts == 2)
        began = time.monotonic()
    assert engine.closed and time.monotonic() - began < 2.0
    assert not pool._seats[0]._restart.is_alive()  # type: ignore[union-attr]

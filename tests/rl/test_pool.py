"""The pool with engines that are tables: who gets what, and what a death means."""

from collections.abc import Sequence

import numpy as np
import pytest

from data.values import Completion
from rl.engines.base import Died, EngineDead, Finished, Health, Mailbox, Request, Sampling, WeightChunk
from rl.pool import RolloutPool


class TableEngine:
    """Answers when told to; keeps what it was given."""

    def __init__(self, name: str, slots: int = 4, whole_groups: bool = False):
        self.name = name
        self.slots = slots
        self.whole_groups = whole_groups
        self.given: list[Request] = []
        self.calls: list[int] = []
        self.closed = False

    def start(self, mailbox: Mailbox) -> None:
        self.mailbox = mailbox

    def submit(self, requests: Sequence[Request]) -> None:
        self.given.extend(requests)
        self.calls.append(len(requests))

    def finish(self, count: int) -> None:
        for r in self.given[:count]:
            one = np.ones(1)
            self.mailbox.put(Finished(self.name, Completion(
                r.prompt_id, r.group_id, r.index, r.attempt, r.seed, one.astype(np.int32), one.astype(np.uint8),
                -one.astype(np.float32), 0 * one.astype(np.int32), "stop", self.name,
            )))  # fmt: skip
        del self.given[:count]

    def abort(self, ids: Sequence[str]) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def begin_update(self, version: int) -> None: ...
    def load(self, chunk: WeightChunk) -> None: ...
    def end_update(self) -> None: ...
    def health(self) -> Health:
        return Health(True, len(self.given), 0, 0, 0.0)

    def close(self) -> None:
        self.closed = True


def requests(position: int, size: int) -> list[Request]:
    prompt = np.array([1], np.int32)
    return [Request(f"p{position}", f"g{position}", 0, i, i, prompt, Sampling(4), position) for i in range(size)]


def test_engines_are_kept_full_and_no_fuller() -> None:
    a, b = TableEngine("a", slots=4), TableEngine("b", slots=4)
    with RolloutPool([a, b]) as pool:
        for position in range(5):
            pool.submit(requests(position, 4))
        assert (len(a.given), len(b.given), len(pool.waiting)) == (5, 5, 10)
        a.finish(3)
        assert len(pool.poll(1.0)) == 3
        assert (len(a.given), len(b.given), len(pool.waiting)) == (5, 5, 7)
        for _ in range(10):
            a.finish(5)
            b.finish(5)
            pool.poll(0.1)
        assert pool.open == 0
    assert a.closed and b.closed


def test_whole_groups_go_by_position_and_are_never_split() -> None:
    engines = [TableEngine(n, slots=2, whole_groups=True) for n in ("a", "b", "c")]
    with RolloutPool(engines) as pool:
        for position in (4, 5, 6, 7):
            pool.submit(requests(position, 6))
        assert [[r.position for r in e.given[::6]] for e in engines] == [[6], [4, 7], [5]]
        assert all(call == 6 for e in engines for call in e.calls)


def test_a_death_is_a_clear_error() -> None:
    engine = TableEngine("engine-7")
    with RolloutPool([engine]) as pool:
        pool.submit(requests(0, 3))
        engine.mailbox.put(Died("engine-7", "killed by SIGKILL\nlast lines: out of memory"))
        with pytest.raises(EngineDead, match=r"engine-7 died with 3 completions unfinished: killed by SIGKILL\n.*out of memory"):
            pool.poll(1.0)


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

"""The loop inside an engine's process, with a table in the place of vLLM."""

import threading
from collections.abc import Sequence
from dataclasses import fields, replace
from multiprocessing import Pipe
from typing import Any

import numpy as np

from data.values import Completion
from rl.engines import server
from rl.engines.base import Health, Request, Sampling
from rl.engines.server import Call, Sampled, Server


class TableCore:
    """A step finishes the oldest request but one; the last stays."""

    def __init__(self) -> None:
        self.requests: dict[str, Request] = {}

    def add(self, request: Request) -> None:
        self.requests[request.id] = request

    def step(self) -> list[Completion]:
        if len(self.requests) == 1:
            return []
        request = self.requests.pop(next(iter(self.requests)))
        return [completion(request)]

    def pause(self) -> None: ...
    def check(self) -> None: ...
    def running_tokens(self) -> int:
        return 0


def completion(r: Request) -> Completion:
    n = r.index  # the first has none, as one that was aborted at once
    tokens = np.arange(n, dtype=np.int32)
    routes = np.arange(n * 4, dtype=np.uint8).reshape(n, 2, 2) if n else None
    return Completion(
        r.prompt_id, r.group_id, r.index, r.attempt, r.seed, tokens, np.ones(n, np.uint8), -tokens.astype(np.float32) / 3, tokens + 7,
        "stop", "table", routes, None if routes is None else np.ones(n, bool),
    )  # fmt: skip


def same(a: Any, b: Any) -> bool:
    return a.dtype == b.dtype and np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


def test_completions_travel_together_whole_and_none_waits_in_an_engine_that_is_paused(monkeypatch: Any) -> None:
    monkeypatch.setattr(server, "SEND_s", 60.0)
    ours, theirs = Pipe()
    thread = threading.Thread(target=_run, args=(Server(theirs, TableCore()),))  # type: ignore[arg-type]
    thread.start()
    asked = [Request("p", "g", 2, i, i << 40, np.zeros(3, np.int32), Sampling(8)) for i in range(4)]
    ours.send(Call(None, "submit", (asked,)))
    assert not ours.poll(0.1), "three have finished, and the engine goes on sampling"
    ours.send(Call(None, "pause", ()))
    said: Sequence[Any] = [ours.recv(), ours.recv()]
    assert isinstance(said[0], Health) and said[0].running == 1 and said[0].tokens == 0 + 1 + 2
    assert isinstance(said[1], Sampled)
    for got, request in zip(said[1].completions(), asked[:3], strict=True):
        want = completion(request)
        assert all(same(getattr(got, f.name), getattr(want, f.name)) for f in fields(Completion)), got
        replace(got).token_ids[:] = 0  # it owns its arrays
    ours.close()
    thread.join(5.0)
    assert not thread.is_alive()


def _run(loop: Server) -> None:
    try:
        loop.run()
    except EOFError:
        loop.pipe.close()

"""The RolloutPool: engines, and which of them samples what.

Completions are asked for a group at a time and come back one by one, in whatever order they finish. An engine that batches on its own
(vLLM) is kept full and no fuller: a free slot takes the next completion, of whatever prompt, and what waits, waits here, so that a
slow engine does not sit on work that another could do. An engine that takes whole groups (hf) gets them by the prompt's place in the
stream alone, because its results may depend on which engine it is.

A dead engine ends the run with its last words.
"""

import queue
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from data.values import Completion
from rl.engines.base import Died, Engine, EngineDead, Mailbox, Request


class RolloutPool:
    """Engines that share a mailbox; a context manager that starts and closes them."""

    def __init__(self, engines: Sequence[Engine]):
        self.engines = list(engines)
        self.mailbox: Mailbox = queue.SimpleQueue()
        self.waiting: deque[Request] = deque()
        """Completions that no engine has yet."""
        self.running: dict[str, Engine] = {}
        """Completions by id, and the engine that has them."""
        self.load = {engine.name: 0 for engine in self.engines}

    def __enter__(self) -> "RolloutPool":
        try:
            with ThreadPoolExecutor(len(self.engines)) as threads:
                list(threads.map(lambda engine: engine.start(self.mailbox), self.engines))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for engine in self.engines:
            engine.close()

    @property
    def open(self) -> int:
        """Completions asked for and not yet handed out."""
        return len(self.waiting) + len(self.running)

    def submit(self, requests: Sequence[Request]) -> None:
        """Asks for completions of one group."""
        engine = self.engines[requests[0].position % len(self.engines)]
        if engine.whole_groups:
            self._give(engine, requests)
        else:
            self.waiting.extend(requests)
            self._feed()

    def poll(self, timeout_s: float) -> list[Completion]:
        """Completions that have finished; waits at most `timeout_s` for the first.

        Raises EngineDead as soon as an engine has died.
        """
        done: list[Completion] = []
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                event = self.mailbox.get(timeout=0 if done else max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return done
            if isinstance(event, Died):
                lost = [i for i, engine in self.running.items() if engine.name == event.engine]
                raise EngineDead(f"engine {event.engine} died with {len(lost)} completions unfinished: {event.reason}")
            if self.running.pop(event.completion.id, None) is not None:
                self.load[event.engine] -= 1
                done.append(event.completion)
                self._feed()

    def collect(self, groups: Sequence[Sequence[Request]], seen: Callable[[Completion], None]) -> None:
        """Samples these groups to the end and calls `seen` with each completion as it finishes."""
        for requests in groups:
            self.submit(requests)
        while self.open:
            for completion in self.poll(timeout_s=1.0):
                seen(completion)

    def _feed(self) -> None:
        """Keeps each engine a quarter over its slots, so that it never waits for a message from here."""
        while self.waiting:
            engine = min(self.engines, key=lambda e: self.load[e.name] / e.slots)
            room = engine.slots + max(1, engine.slots // 4) - self.load[engine.name]
            if room <= 0:
                return
            # One message for a stretch of one group: the prompt travels once.
            first = self.waiting.popleft()
            stretch = [first]
            while self.waiting and len(stretch) < room and self.waiting[0].group_id == first.group_id:
                stretch.append(self.waiting.popleft())
            self._give(engine, stretch)

    def _give(self, engine: Engine, requests: Sequence[Request]) -> None:
        for request in requests:
            assert request.id not in self.running, f"{request.id} was asked for twice"
            self.running[request.id] = engine
        self.load[engine.name] += len(requests)
        engine.submit(requests)

"""The RolloutPool: engines, and which of them samples what.

Completions are asked for a group at a time and come back one by one, in whatever order they finish. An engine that batches on its own
(vLLM) is kept full and no fuller: a free slot takes the next completion, of whatever prompt, and what waits, waits here, so that a
slow engine does not sit on work that another could do. An engine that takes whole groups (hf) gets them by the prompt's place in the
stream alone, because its results may depend on which engine it is.

An engine may die, hang, or give log-probs that are no numbers. Then its life is over: what it had not finished is asked again, of
another engine or of its next life, by the same requests and so with the same seeds; nothing that the old life still says is taken.
It is started again in the background and brought to the current weights (`catch_up`) before it samples. An engine that dies again
and again without finishing anything, or a completion that is there at every death, ends the run with the engine's last log lines.
"""

import queue
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import numpy as np

from data.values import Completion
from rl.engines.base import Died, Engine, EngineDead, Finished, Pulse, Request
from rl.engines.lives import Mail, Seat, Started

DEATHS = 5
"""An engine that died so often in a row without finishing a completion will not come round."""
REASKS = 8
"""A completion that was unfinished at so many deaths is taken for their cause."""
WATCH_s = 0.25
"""How often engines are looked at that say nothing."""


class RolloutPool:
    """Engines that share a mailbox; a context manager that starts and closes them. For one thread."""

    def __init__(self, engines: Sequence[Engine], *, stall_s: float = 60.0, say: Callable[[str], None] = lambda line: None):
        """stall_s: how long an engine that has work may sample no token; say: told when an engine dies, and when it is back."""
        self.engines = list(engines)
        self.catch_up: Callable[[Engine], None] = lambda engine: None
        """Brings an engine that was started again to the current weights; called in a thread of its own."""
        self.waiting: deque[Request] = deque()
        """Completions that no engine has yet."""
        self._mail: queue.SimpleQueue[Mail] = queue.SimpleQueue()
        self._seats = [Seat(engine, self._mail) for engine in self.engines]
        self._wanted: dict[str, int] = {}
        """Completions asked for and not handed out, by id, and how many deaths have undone them."""
        self._groups: dict[str, Sequence[Request]] = {}
        """All requests of the groups in work, where engines take whole groups."""
        self._held = False
        self._stall_s = stall_s
        self._say = say
        self._restarts = self._reasked = self._lost_tokens = 0

    def __enter__(self) -> "RolloutPool":
        try:
            with ThreadPoolExecutor(len(self._seats)) as threads:
                list(threads.map(Seat.start, self._seats))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for seat in self._seats:
            seat.close()

    @property
    def open(self) -> int:
        """Completions asked for and not yet handed out."""
        return len(self._wanted)

    @property
    def running(self) -> int:
        """Completions that engines have and not yet handed out."""
        return sum(len(seat.running) for seat in self._seats)

    def hold(self) -> None:
        """Gives engines nothing more until `release`; who goes on polling sees them become idle."""
        self._held = True

    def release(self) -> None:
        self._held = False
        self._feed()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Engines stand still within, between two tokens of what they have in work."""
        self._each(lambda engine: engine.pause())
        try:
            yield
        finally:
            self._each(lambda engine: engine.resume())

    def _each(self, call: Callable[[Engine], None]) -> None:
        """Calls all engines that are up, side by side."""

        def call_if_alive(engine: Engine) -> None:
            with suppress(EngineDead):  # its death is in the mail
                call(engine)

        up = [seat.engine for seat in self._seats if seat.up]
        with ThreadPoolExecutor(len(self._seats)) as threads:
            list(threads.map(call_if_alive, up))

    def submit(self, requests: Sequence[Request]) -> None:
        """Asks for completions of one group."""
        for request in requests:
            assert request.id not in self._wanted, f"{request.id} was asked for twice"
            self._wanted[request.id] = 0
        if self.engines[0].whole_groups:
            self._groups[requests[0].group_id] = requests
        self.waiting.extend(requests)
        self._feed()

    def poll(self, timeout_s: float) -> list[Completion]:
        """Completions that have finished; waits at most `timeout_s` for the first.

        Raises EngineDead when an engine, or a completion that kills engines, has had its last chance.
        """
        done: list[Completion] = []
        deadline = time.monotonic() + timeout_s
        while True:
            left_s = 0.0 if done else max(0.0, deadline - time.monotonic())
            try:
                done += self._read(self._mail.get(timeout=min(left_s, WATCH_s)))
            except queue.Empty:
                self._feed()  # once for all that a step finished, and so in few messages
                self._watch()
                if left_s <= WATCH_s:
                    return done

    def collect(self, groups: Sequence[Sequence[Request]], seen: Callable[[Completion], None]) -> None:
        """Samples these groups to the end and calls `seen` with each completion as it finishes."""
        for requests in groups:
            self.submit(requests)
        while self.open:
            for completion in self.poll(timeout_s=1.0):
                seen(completion)

    def sleep(self) -> None:
        """All engines give their GPU memory back, and have it again after the next weight update. There must be no work."""
        assert not self.open, f"engines were put to sleep over {self.open} completions"
        with ThreadPoolExecutor(len(self._seats)) as threads:
            list(threads.map(Seat.sleep, self._seats))

    def metrics(self) -> dict[str, float]:
        """Engines that can sample now; and since the last call: how often one was started again, completions that were asked again
        for it, and tokens of those that are known to have been sampled in vain (they are in no other count)."""
        numbers: dict[str, float] = {
            "engines/alive": sum(seat.up for seat in self._seats),
            "engines/restarts": self._restarts,
            "engines/reasked": self._reasked,
            "tokens/lost": self._lost_tokens,
        }
        self._restarts = self._reasked = self._lost_tokens = 0
        return numbers

    # --- who gets what ------------------------------------------------------------------------------------------------

    def _feed(self) -> None:
        """Keeps engines over their slots, so that one never waits for a message from here: by a quarter, and by as much again as it
        has slots where that leaves as much for all (completions that began together end together, more than a quarter in one step)."""
        while self.waiting and not self._held:
            seat, room = self._place(self.waiting[0])
            if seat is None or room <= 0:
                return
            # One message for a stretch of one group: the prompt travels once.
            first = self.waiting.popleft()
            stretch = [first]
            while self.waiting and len(stretch) < room and self.waiting[0].group_id == first.group_id:
                stretch.append(self.waiting.popleft())
            seat.give(self._groups.get(first.group_id, stretch), stretch)

    def _place(self, request: Request) -> tuple[Seat | None, int]:
        """The engine for a request, if one can take work, and how many it takes."""
        up = [seat for seat in self._seats if seat.up]
        if request.group_id in self._groups:
            own = self._seats[request.position % len(self._seats)]
            return (own if own.up else min(up, key=lambda seat: len(seat.running), default=None)), len(self._groups[request.group_id])
        if not up:
            return None, 0
        seat = min(up, key=lambda seat: len(seat.running) / seat.engine.slots)
        slots = seat.engine.slots
        over = slots if len(self.waiting) > sum(seat.engine.slots for seat in up) else max(1, slots // 4)
        return seat, slots + over - len(seat.running)

    # --- what engines say ---------------------------------------------------------------------------------------------

    def _read(self, mail: Mail) -> list[Completion]:
        """Takes in what an engine said in its present life; gives the completion, if it is one that is wanted."""
        seat = mail.seat
        if mail.life != seat.life:
            return []
        match mail.event:
            case Finished(completion=completion):
                return self._finished(seat, completion, mail.at)
            case Pulse() as pulse:
                seat.hear(pulse, mail.at)
            case Started():
                seat.up = True
                self._restarts += 1
                self._say(f"engine {seat.name} is back")
                self._feed()
            case Died(reason=reason):
                self._died(seat, reason)
        return []

    def _finished(self, seat: Seat, completion: Completion, at: float) -> list[Completion]:
        if not np.isfinite(completion.engine_logp[completion.mask.astype(bool)]).all():
            self._died(seat, f"gave log-probs that are no numbers, for {completion.id}\n{seat.engine.last_words()}")
            return []
        if seat.take(completion, at) is None:  # a whole group was asked again for its other completions
            self._lost_tokens += len(completion.token_ids)
            return []
        del self._wanted[completion.id]
        group = self._groups.get(completion.group_id, ())
        if not any(request.id in self._wanted for request in group):
            self._groups.pop(completion.group_id, None)
        return [completion]

    def _watch(self) -> None:
        """Ends lives that have been silent for too long."""
        for seat in self._seats:
            silent_s = seat.silence(time.monotonic(), self._stall_s)
            if silent_s is not None:
                self._died(seat, f"hung: no token for {silent_s:.3g} s\n{seat.engine.last_words()}")

    def _died(self, seat: Seat, reason: str) -> None:
        lost, tokens = seat.end()
        self._lost_tokens += tokens
        if seat.deaths >= DEATHS:
            raise EngineDead(f"engine {seat.name} died {seat.deaths} times without finishing a completion, the last time: {reason}")
        for request in lost:
            self._wanted[request.id] += 1
            if self._wanted[request.id] >= REASKS:
                raise EngineDead(
                    f"completion {request.id} was unfinished at {REASKS} deaths of engines and may be their cause, the last time "
                    f"of {seat.name}: {reason}"
                )
        self._reasked += len(lost)
        self._say(f"engine {seat.name} died, {len(lost)} completions are asked again: {reason.splitlines()[0]}")
        self.waiting.extendleft(reversed(lost))
        seat.restart(self.catch_up)
        self._feed()

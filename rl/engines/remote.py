"""An engine on another machine, as the trainer sees it: an `rl.engines.host` behind HTTP (`rollout.servers`) or on a Ray cluster.

Why a protocol of our own. vLLM's server has most of what is needed, in two APIs that it marks as for development (0.32): tokens in and
out as JSON, a request a completion, and `pause`, `start_weight_update`, `update_weights`, `finish_weight_update`, `resume`. Weights come
to it by NCCL or CUDA IPC alone, so not on a CPU and not between clusters; nobody owns it; it listens everywhere unless told, and its
RL endpoints ask for no key of their own. trl serves vLLM with endpoints of its own (one blocking call a batch, weights by NCCL tensor
by tensor), prime-rl adds its own to vLLM's (weights from a shared folder or by NCCL), verl and NeMo-RL put engines into Ray actors. None
of them serves transformers too, and in each the trainer sees another engine than on one machine. Here the far end is the Engine that
there is already: the same calls, events, seeds, versions and log-probs, so that a recipe with servers gives what one without gives.

A life is a session at the host, with two threads at this end: calls go out in order, as many at once as there are, without anybody
waiting for them; what the engine says is asked for all the time, and is how it is seen that the host is gone. Then everything is as
with a process that died: one Died in the mailbox, and another life. It begins when the host answers again, however long that takes;
only when no host has answered for minutes is that an error.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from data.recipe import InputError
from rl.engines.base import Died, EngineDead, Event, Finished, Health, Mailbox, Part, Pulse, Request, WeightChunk
from rl.engines.host import Owned
from rl.engines.server import Answer, Call, Failed, Ready
from rl.engines.wire import Broken, Hello, Welcome

log = logging.getLogger(__name__)

FIRST_s = 20.0
"""How long the first life waits for a server that is just being started, or just being left by another learner."""
RETRY_s = 5.0
"""Longest wait between two tries to reach it."""
GONE_s = 300.0
"""Hosts that have all been away for so long will not come back by themselves."""
REMIND_s = 30.0
"""How often it is said that none can be reached."""


class Transport(Protocol):
    """How a host is reached. EngineDead where it is not; the errors of `rl.engines.host` as they are there."""

    where: str
    """For people."""

    def connect(self, hello: Hello) -> Welcome: ...

    def calls(self, session: str, number: int, calls: Sequence[Call]) -> list[Answer | Broken]: ...

    def events(self, session: str, after: int) -> list[Event | Ready | Failed]:
        """Waits some seconds for the first."""

    def weights(self, session: str, chunk: WeightChunk, version: int) -> None:
        """Brings a chunk's bytes to the host; several engines may be sent the same chunk of a version."""

    def leave(self, session: str) -> None:
        """Gives the engine back; that this fails is no error."""


class Fleet:
    """The remote engines of a run: since when which of them cannot be reached, and what they have to say."""

    def __init__(self, count: int, say: Callable[[str], None] = lambda line: None) -> None:
        self.count = count
        self.away: dict[str, float] = {}
        self._say = say
        self._said: set[str] = set()
        self._saying = threading.Lock()
        self._reminded = -REMIND_s

    def remind(self, trouble: str) -> None:
        """Says that the run waits for a host, at once and then every half minute."""
        with self._saying:
            if time.monotonic() - self._reminded >= REMIND_s:
                self._reminded = time.monotonic()
                self._say(f"no engine answers; the run waits for one, {max(0.0, GONE_s - self.gone_s()):.0f} s more at most: {trouble}")

    def tell(self, lines: Sequence[str]) -> None:
        """Says each line once, however many engines have it."""
        with self._saying:
            for line in lines:
                if line not in self._said:
                    self._said.add(line)
                    self._say(line)

    def gone_s(self) -> float:
        """Seconds for which none of them could be reached."""
        away = list(self.away.values())
        return time.monotonic() - max(away) if len(away) == self.count else 0.0


class RemoteEngine:
    """Implements `rl.engines.base.Engine`. An update is gathered there first, and touches what is sampled from in `end_update` alone."""

    def __init__(self, name: str, transport: Transport, hello: Hello, fleet: Fleet, *, slots: int, whole_groups: bool) -> None:
        """slots: until the host has said how many it has."""
        self.name = name
        self.transport = transport
        self.hello = hello
        self.fleet = fleet
        self.slots = slots
        self.whole_groups = whole_groups
        self._link: _Link | None = None
        self._updating: _Link | None = None
        """The life in which the last update began."""
        self._brought: tuple[_Link, int] | None = None
        """The life that has all of an update, and its version."""
        self._stop = threading.Event()
        self._lived = False
        self._trouble = ""
        """Why it could not be reached when that was last tried."""

    def start(self, mailbox: Mailbox) -> None:
        """Waits for a host that is away, in all lives but the first. InputError if that will not be this learner's."""
        self.close()
        self._stop = stop = threading.Event()
        welcome = self._connect(stop)
        self.slots = welcome.slots
        self._link = link = _Link(self.name, self.transport, welcome.session, mailbox)
        if stop.is_set():
            link.close()
        link.ready.result()
        self._lived = True

    def _connect(self, stop: threading.Event) -> Welcome:
        wait_s = 0.1
        self.fleet.away.setdefault(self.name, time.monotonic())
        while True:
            try:
                welcome = self.transport.connect(self.hello)
                del self.fleet.away[self.name]
                self.fleet.tell(welcome.says)
                return welcome
            except (EngineDead, InputError) as error:
                self._trouble = str(error)
                soon = isinstance(error, EngineDead | Owned) and time.monotonic() - self.fleet.away[self.name] < FIRST_s
                if not self._lived and not soon:
                    raise InputError(f"engine {self.name}: {error}") from None
            if self._lived and (gone_s := self.fleet.gone_s()) > 0.0:
                if gone_s > GONE_s:
                    raise EngineDead(f"no engine could be reached for {gone_s:.0f} s; {self._trouble}")
                self.fleet.remind(self._trouble)
            if stop.wait(wait_s):
                raise EngineDead(f"engine {self.name} was closed while it was waited for: {self._trouble}")
            wait_s = min(2 * wait_s, RETRY_s)

    def submit(self, requests: Sequence[Request]) -> None:
        self._alive().post("submit", list(requests))

    def abort(self, ids: Sequence[str]) -> None:
        self._alive().post("abort", list(ids))

    def pause(self) -> None:
        self._alive().ask("pause")

    def resume(self) -> None:
        self._alive().ask("resume")

    def begin_update(self, version: int) -> None:
        self._updating = link = self._alive()
        link.version = version
        link.ask("begin_update", version)

    def load(self, chunk: WeightChunk) -> None:
        """Brings it as far as the host, which gives the engine none before it has all."""
        self._in_update().load(chunk)

    def end_update(self) -> None:
        self._in_update().ask("end_update")

    def bring(self, version: int, chunks: Sequence[WeightChunk]) -> None:
        """Sends a whole update while the engine samples; one that this life has is not sent again. `end_update` is left to do, and raises
        EngineDead in another life."""
        link = self._alive()
        if (link, version) == self._brought:
            return
        self.begin_update(version)
        for chunk in chunks:
            self.load(chunk)
        self._brought = (link, version)

    def sleep(self) -> None:
        self._alive().ask("sleep")

    def wake(self, part: Part) -> None:
        self._alive().ask("wake", part)

    def health(self) -> Health:
        return self._alive().ask("health")

    def last_words(self) -> str:
        return self._trouble

    def close(self) -> None:
        self._stop.set()
        link, self._link = self._link, None
        if link is not None:
            link.close()

    def _alive(self) -> "_Link":
        link = self._link  # another thread may close it
        if link is None or not link.ready.done():
            raise EngineDead(f"engine {self.name} is not running: it was not started, or closed")
        return link

    def _in_update(self) -> "_Link":
        link = self._alive()
        if link is not self._updating:
            raise EngineDead(f"engine {self.name} began another life in the middle of an update")
        return link


class _Link:
    """One session: calls that go out, events that come in, and who waits for an answer."""

    def __init__(self, name: str, transport: Transport, session: str, mailbox: Mailbox) -> None:
        self.name = name
        self.transport = transport
        self.session = session
        self.mailbox = mailbox
        self.version = 0
        """Of the update that is being sent."""
        self.ready: Future[None] = Future()
        self.waiting: dict[int, Future[Any]] = {}
        self.numbers = 0
        self.outbox: SimpleQueue[Call | None] = SimpleQueue()
        self.reason: str | None = None
        """Why it is over; None while it is not."""
        self.lock = threading.Lock()
        for work in (self._write, self._read):
            threading.Thread(target=self._guarded, args=(work,), name=f"{name}{work.__name__}", daemon=True).start()

    def post(self, method: str, *args: Any) -> None:
        with self.lock:
            self._send(Call(None, method, args))

    def ask(self, method: str, *args: Any) -> Any:
        answer: Future[Any] = Future()
        with self.lock:
            self.numbers += 1
            self.waiting[self.numbers] = answer
            self._send(Call(self.numbers, method, args))
        return answer.result()

    def load(self, chunk: WeightChunk) -> None:
        try:
            self.transport.weights(self.session, chunk, self.version)
        except EngineDead as error:
            self.end(str(error))
            raise

    def close(self) -> None:
        over = self.reason is not None
        self.end("it was closed", said=False)
        if not over:
            self.transport.leave(self.session)

    def end(self, reason: str, said: bool = True) -> None:
        """Over: whoever waits is told, and the mailbox too if it lived and this is its death."""
        with self.lock:
            if self.reason is not None:
                return
            self.reason = f"engine {self.name} is gone: {reason}"
            self.outbox.put(None)
            started = self.ready.done()
            waiting = list(self.waiting.values()) + ([] if started else [self.ready])
            self.waiting.clear()
            if started and said:
                self.mailbox.put(Died(self.name, reason))
        for answer in waiting:
            answer.set_exception(EngineDead(self.reason))

    def _send(self, call: Call) -> None:
        if self.reason is not None:
            raise EngineDead(self.reason)
        self.outbox.put(call)

    def _guarded(self, work: Any) -> None:
        try:
            work()
        except EngineDead as error:
            self.end(str(error))
        except Exception as error:  # no thread ends without a word
            log.exception("engine %s", self.name)
            self.end(f"{type(error).__name__}: {error}")

    def _write(self) -> None:
        batch = 0
        while (call := self.outbox.get()) is not None:
            calls = [call]
            with suppress(Empty):
                while (more := self.outbox.get_nowait()) is not None:
                    calls.append(more)
                return
            batch += 1
            for answer in self.transport.calls(self.session, batch, calls):
                match answer:
                    case Answer(number, value):
                        self._answered(number, value)
                    case Broken(error=error):
                        self.end(error)

    def _answered(self, number: int, value: Any) -> None:
        with self.lock:
            if self.reason is None:
                self.waiting.pop(number).set_result(value)

    def _read(self) -> None:
        count = 0
        while self.reason is None:
            for event in self.transport.events(self.session, count):
                count += 1
                self._hear(event)

    def _hear(self, event: Event | Ready | Failed) -> None:
        match event:
            case Finished(completion=completion):
                self._tell(Finished(self.name, replace(completion, engine=self.name)))
            case Pulse(health=health):
                self._tell(Pulse(self.name, health))
            case Ready():
                with self.lock:
                    if self.reason is None:
                        self.ready.set_result(None)
            case Failed(error=reason) | Died(reason=reason):
                self.end(f"{self.transport.where}: {reason}")

    def _tell(self, event: Event) -> None:
        with self.lock:
            if self.reason is None:
                self.mailbox.put(event)

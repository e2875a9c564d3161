"""An engine that is lent: what serves a learner on another machine, behind HTTP (`rl.engines.http`) or in a Ray actor.

One learner at a time owns it. It says hello, becomes the owner if what both have to have in common is the same, and gets an engine at
version 0: the one that was loaded when the host began, or a new life of it. What the engine says is numbered and kept until the owner
has taken it, and a batch of calls that comes twice is done once, so that a broken connection loses nothing and asks nothing twice.
The ownership ends when the owner says so, or has not been heard of for a while.

An update is gathered in a weight file of the host's own, each tensor checked by name, type and shape against the policy here, and
reaches the engine when the whole model is there. So one that breaks off in the middle touches nothing.
"""

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from data.recipe import InputError
from rl.engines.base import Died, Engine, EngineDead, Event, TensorSlot
from rl.engines.server import Answer, Call, Failed, Ready
from rl.engines.weights import Manifest, WeightFile, WeightMismatch
from rl.engines.wire import Broken, Hello, Malformed, Welcome

log = logging.getLogger(__name__)

LEASE_s = 20.0
"""An owner of whom nothing was heard for so long is gone; it asks for events all the time."""
LOST_s = 2.0
"""The same where its connection broke, which a process that is there mends at once."""
METHODS = ("submit", "abort", "pause", "resume", "begin_update", "end_update", "sleep", "wake", "health")
"""What an owner may call; `load` has a way of its own, `stage`."""


class Refused(InputError):
    """The engine is not given: it samples from something else."""


class Owned(InputError):
    """The engine is another learner's now."""


class NotYours(EngineDead):
    """A session that has ended, or never was."""


class Outbox:
    """What one life of an engine says, numbered from 1, until it has been taken; a `Mailbox`."""

    def __init__(self) -> None:
        self.said: deque[tuple[int, Event | Ready | Failed]] = deque()
        self.count = 0
        self.last: Died | Failed | None = None
        """Why this life is over."""
        self.changed = threading.Condition()

    def put(self, event: Event | Ready | Failed, /) -> None:
        with self.changed:
            self.count += 1
            if isinstance(event, Died | Failed):
                self.last = event
            self.said.append((self.count, event))
            self.changed.notify_all()

    def take(self, after: int, wait_s: float) -> list[Event | Ready | Failed]:
        """What was said after number `after`, which the taker has got; waits for it at most so long."""
        with self.changed:
            while self.said and self.said[0][0] <= after:
                self.said.popleft()
            if not self.said:
                self.changed.wait(wait_s)
            return [event for _, event in self.said]


class Life:
    """A life of the engine: its outbox, and the thread that begins it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.outbox = Outbox()
        self.begun = threading.Thread(target=self._begin, name=f"{engine.name}-start", daemon=True)
        self.begun.start()

    def _begin(self) -> None:
        try:
            self.engine.start(self.outbox)
            self.outbox.put(Ready())
        except EngineDead as error:
            self.outbox.put(Failed(str(error)))
        except Exception as error:  # a life that cannot begin is a death like any other
            log.exception("engine %s could not be started", self.engine.name)
            self.outbox.put(Failed(f"{type(error).__name__}: {error}"))

    def end(self) -> None:
        """Also one that is only about to begin."""
        self.engine.close()
        while self.begun.is_alive():
            self.engine.close()
            self.begun.join(0.1)


class Host:
    """Lends an engine; every method may be called from any thread."""

    def __init__(
        self, engine: Engine, facts: dict[str, str], manifest: Manifest, max_model_len: int | None, says: Sequence[str] = ()
    ) -> None:
        """facts: of `rl.engines.make.facts_of`; manifest: what the policy's files hold; max_model_len: None is no limit; says: Welcome's.

        Begins to load the policy at once.
        """
        self.engine = engine
        self.facts = facts
        self.manifest = manifest
        self.max_model_len = max_model_len
        self.says = tuple(says)
        self.life: Life = Life(engine)
        self.owner: Hello | None = None
        self._session = ""
        self._heard = 0.0
        self._used = False
        """Whether this life was ever given to anybody."""
        self._file: WeightFile | None = None
        self._version = 0
        self._batch = 0
        self._answers: list[Answer | Broken] = []
        self._lock = threading.RLock()
        """For who owns it."""
        self._calling = threading.Lock()
        """For calls, which are done one batch after the other."""

    def connect(self, hello: Hello) -> Welcome:
        """Makes the caller the owner. Refused if its policy or settings are others, Owned if another learner has it."""
        with self._lock:
            self._check(hello)
            if self.owner is not None and self.owner.owner != hello.owner and time.monotonic() - self._heard < LEASE_s:
                raise Owned(f"samples for {self.owner.name} now, and for one learner at a time; wait for its end, or name another server")
            self._free()
            if self._used or self.life.outbox.last is not None:
                self.life.end()
                self.life = Life(self.engine)
            self._used = True
            self._file = WeightFile(hello.manifest) if hello.manifest else None
            self.owner, self._session, self._heard = hello, secrets.token_hex(16), time.monotonic()
            log.info("lent to %s", hello.name)
            return Welcome(self._session, self.engine.slots, self.says)

    def _check(self, hello: Hello) -> None:
        for name, ours in self.facts.items():
            theirs = hello.facts.get(name, "")
            if theirs != ours:
                raise Refused(
                    f"its {name} is {_short(ours)}, the learner's {_short(theirs)}; serve it with the learner's recipe and policy"
                )
        if self.max_model_len is not None and hello.max_model_len > self.max_model_len:
            raise Refused(
                f"takes prompt and completion of {self.max_model_len} tokens together, and {hello.max_model_len} are needed; "
                f"serve it with rollout.max_model_len={hello.max_model_len}"
            )
        for name, spec in self.manifest.items() if hello.manifest else ():
            if name not in hello.manifest or hello.manifest[name].shape != spec.shape:
                raise Refused(f"its policy has {name} of shape {spec.shape}, which the learner's has not; serve the learner's policy")

    def calls(self, session: str, number: int, calls: Sequence[Call]) -> list[Answer | Broken]:
        """Does a batch of calls; again with the same number it gives the same answers. NotYours if the session has ended."""
        with self._calling:
            with self._lock:
                self._own(session)
                if number == self._batch:
                    return self._answers
                life = self.life
            life.begun.join()
            answers = [answer for call in calls if (answer := self._call(call)) is not None]
            with self._lock:
                self._own(session)
                self._batch, self._answers = number, answers
            return answers

    def _call(self, call: Call) -> Answer | Broken | None:
        if call.method not in METHODS:
            raise Malformed(f"no call named '{call.method}'")
        ours: dict[str, Callable[..., Any]] = {"begin_update": self._begin_update, "end_update": self._end_update}
        try:
            value = ours.get(call.method, getattr(self.engine, call.method))(*call.args)
        except (EngineDead, WeightMismatch) as error:
            return Broken(call.number, str(error)) if call.number is not None else None  # its death is among the events
        return Answer(call.number, value) if call.number is not None else None

    def events(self, session: str, after: int, wait_s: float) -> list[Event | Ready | Failed]:
        """What the engine has said since event number `after`. NotYours if the session has ended."""
        with self._lock:
            self._own(session)
            outbox = self.life.outbox
        said = outbox.take(after, wait_s)
        with self._lock:
            self._own(session)
        return said

    @contextmanager
    def stage(self, session: str, slots: Sequence[TensorSlot]) -> Iterator[list[memoryview]]:
        """Where the bytes of these tensors are to be written, inside of it, for an update that has begun.

        What raises there has not come. WeightMismatch if they are not the policy's.
        """
        with self._lock:
            self._own(session)
            file = self._updates()
        yield file.room(slots)
        file.came(slots)

    def _updates(self) -> WeightFile:
        if self._file is None:
            raise WeightMismatch("weight update: the learner said at first that there would be none")
        return self._file

    def _begin_update(self, version: int) -> None:
        self._updates().begin()
        self._version = version

    def _end_update(self) -> None:
        file = self._updates()
        file.complete()
        self.engine.begin_update(self._version)
        for chunk in file.chunks:
            self.engine.load(chunk)
        self.engine.end_update()

    def lost(self, session: str) -> None:
        """The owner's connection broke: if it does not ask again soon it is gone."""
        with self._lock:
            if session == self._session:
                self._heard = min(self._heard, time.monotonic() - LEASE_s + LOST_s)

    def leave(self, session: str) -> None:
        """The owner does not need it any more."""
        with self._lock:
            if self.owner is not None and session == self._session:
                log.info("given back by %s", self.owner.name)
                self._free()

    def state(self) -> dict[str, str | None]:
        """What anybody may know."""
        owner = self.owner if time.monotonic() - self._heard < LEASE_s else None
        last = self.life.outbox.last
        state = "loading" if self.life.begun.is_alive() else "ready" if last is None else "dead"
        return {"state": state, "owner": owner.name if owner else None}

    def failed(self) -> str | None:
        """Why it never had an engine; None if that is not so. A learner is told itself."""
        last = self.life.outbox.last
        return last.error if isinstance(last, Failed) and not self._used else None

    def close(self) -> None:
        """Ends engine and ownership."""
        with self._lock:
            self._free()
        self.life.end()

    def _own(self, session: str) -> None:
        if self.owner is None or not secrets.compare_digest(session, self._session):
            raise NotYours("the session has ended: the server ended, was started again, or has another learner")
        self._heard = time.monotonic()

    def _free(self) -> None:
        """Nobody's, and without memory for weights."""
        self.owner, self._session, self._batch, self._answers = None, "", 0, []
        if self._file is not None:
            self._file.close()
            self._file = None


def _short(fact: str) -> str:
    return f"{fact[:12]}…" if len(fact) > 40 else fact

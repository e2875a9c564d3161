"""An engine's place in a pool, and its lives there: one after the other, the next begun where one has ended.

Each life has a mailbox of its own, and what comes out of it is stamped with the life's number. So a completion that a dead engine
had sent, or that a hung one finishes after all, is known for what it is: its request has been given to another life since, and it
must not be taken a second time. The next life begins in the background, and samples only when it has the current weights.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import NamedTuple

from data.values import Completion
from rl.engines.base import Died, Engine, EngineDead, Event, Pulse, Request, patience_s

log = logging.getLogger(__name__)

BACKOFF_s = 1.0
"""Wait before a life that follows two in a row without a finished completion; it doubles with each further one."""


@dataclass(frozen=True)
class Started:
    """An engine has a new life, with the current weights."""

    engine: str


class Mail(NamedTuple):
    """What an engine said, in which of its lives, and when by the monotonic clock."""

    seat: "Seat"
    life: int
    event: Event | Started
    at: float


@dataclass(frozen=True)
class Letterbox:
    """The mailbox of one life."""

    seat: "Seat"
    life: int

    def put(self, event: Event | Started, /) -> None:
        self.seat.mail.put(Mail(self.seat, self.life, event, time.monotonic()))


class Seat:
    """One engine of a pool. All but the restart happens in the thread that reads the mail."""

    def __init__(self, engine: Engine, mail: "SimpleQueue[Mail]") -> None:
        self.engine = engine
        self.mail = mail
        self.life = 0
        """Counts its lives; that of a mail that is another's is over."""
        self.up = False
        """Whether it can be given work."""
        self.deaths = 0
        """Lives in a row that ended without a finished completion."""
        self.running: dict[str, Request] = {}
        """What it is wanted to finish, by id."""
        self._heard = 0.0
        self._paused = False
        self._told_tokens = 0
        self._taken_tokens = 0
        self._closing = threading.Event()
        self._restart: threading.Thread | None = None

    @property
    def name(self) -> str:
        return self.engine.name

    def start(self) -> None:
        """The first life; raises what the engine raises."""
        self.engine.start(Letterbox(self, self.life))
        self.up = True

    def give(self, requests: Sequence[Request], wanted: Iterable[Request]) -> None:
        """Submits requests of one group, of which some are `wanted` and others were taken already."""
        if not self.running:
            self._heard = time.monotonic()  # idle, it had nothing to say
        self.running.update((request.id, request) for request in wanted)
        with suppress(EngineDead):  # its death is in the mail, and brings them back
            self.engine.submit(requests)

    def take(self, completion: Completion, at: float) -> Request | None:
        """The request that a completion answers; None if it was taken already, in a life before."""
        self._heard = at
        self._taken_tokens += len(completion.token_ids)
        self.deaths = 0
        return self.running.pop(completion.id, None)

    def hear(self, pulse: Pulse, at: float) -> None:
        self._heard = at
        self._paused = pulse.health.paused
        self._told_tokens = pulse.health.tokens

    def silence(self, now: float, stall_s: float) -> float | None:
        """Seconds for which it has said nothing, if that is too long for what it has to do."""
        if not self.up or self._paused or not self.running:
            return None
        longest = max(len(request.prompt_ids) for request in self.running.values())
        silent_s = now - self._heard
        return silent_s if silent_s > patience_s(stall_s, longest) else None

    def end(self) -> tuple[list[Request], int]:
        """Ends this life: what it had not finished, and how many tokens of that it is known to have sampled."""
        lost, tokens = list(self.running.values()), max(0, self._told_tokens - self._taken_tokens)
        self.running = {}
        self._told_tokens = self._taken_tokens = 0
        self.up = self._paused = False
        self.life += 1
        self.deaths += 1
        return lost, tokens

    def sleep(self) -> None:
        """Puts the engine to sleep; a life that is about to begin takes its memory first, and then gives it back."""
        if self._restart is not None:
            self._restart.join()
        with suppress(EngineDead):  # its death is in the mail; the next life begins when engines have their turn again
            self.engine.sleep()

    def restart(self, catch_up: Callable[[Engine], None]) -> None:
        """Begins the next life in the background; in its mailbox there will be Started or Died."""
        delay_s = BACKOFF_s * 2 ** (self.deaths - 2) if self.deaths > 1 else 0.0
        work = (Letterbox(self, self.life), delay_s, catch_up)
        self._restart = threading.Thread(target=self._begin_again, args=work, name=f"{self.name}-restart", daemon=True)
        self._restart.start()

    def _begin_again(self, mailbox: Letterbox, delay_s: float, catch_up: Callable[[Engine], None]) -> None:
        try:
            self.engine.close()
            if self._closing.wait(delay_s):
                return
            self.engine.start(mailbox)
            catch_up(self.engine)
            mailbox.put(Started(self.name))
        except EngineDead as error:
            mailbox.put(Died(self.name, f"started again: {error}"))
        except Exception as error:  # a life that cannot begin is a death like any other
            log.exception("engine %s could not be started again", self.name)
            mailbox.put(Died(self.name, f"started again: {error!r}"))

    def close(self) -> None:
        """Ends the engine, also one that is about to begin another life."""
        self._closing.set()
        self.engine.close()
        while self._restart is not None and self._restart.is_alive():
            self.engine.close()
            self._restart.join(0.1)

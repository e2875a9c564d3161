"""The pool of conversations: asked for completions, it asks the engines for turns.

To those who ask it is a RolloutPool. A completion's function (`rl/conversation.py`) runs in an event loop in a thread of its own, beside
the engines; each of its turns is a request to the pool beneath, a group of one with a seed that depends on the completion's and the
turn's number alone. So an engine that dies costs no conversation anything but time, and with the hf engine, whose calls are then of
one row each, a completion is the same to the bit whenever it is asked, as long as its tools answer the same. Where the stream samples
ahead, new weights may come between two turns; each token has its own version.

A function that blocks the loop for longer than `rollout.conversation_timeout_s` cannot be ended: its thread is left behind, its
completion has failed, and the others begin again in another thread.
"""

import asyncio
import copy
import sys
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from data.values import Completion
from rl.config import RolloutConfig
from rl.conversation import Conversation, Function, Generate
from rl.engines.base import Engine, Request
from rl.inputs import load_conversation
from rl.pool import RolloutPool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TURN_s = 0.005
"""How long the engines may be listened to before what functions ask is looked at."""
BEAT_s = 0.1
"""How often a loop shows that it is alive."""
CLOSE_s = 2.0
"""What conversations that nobody waits for any more get to end in."""


def make_pool(
    rollout: RolloutConfig, engines: Sequence[Engine], tokenizer: "PreTrainedTokenizerBase", say: Callable[[str], None]
) -> RolloutPool:
    """The pool that a recipe asks for, not started; InputError if its conversation cannot be loaded."""
    if rollout.conversation is None:
        return RolloutPool(engines, stall_s=rollout.stall_s, say=say)
    function, name = load_conversation(rollout.conversation), rollout.conversation.rpartition(":")[2]
    limit_s = rollout.conversation_timeout_s
    return ConversationPool(engines, function, name, tokenizer, timeout_s=limit_s, stall_s=rollout.stall_s, say=say)


class ConversationPool(RolloutPool):
    """Its methods belong to one thread, as those of a RolloutPool do."""

    def __init__(
        self,
        engines: Sequence[Engine],
        function: Function,
        name: str,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        timeout_s: float,
        stall_s: float = 60.0,
        say: Callable[[str], None] = lambda line: None,
    ):
        """name: of the function, in messages; timeout_s: the longest it may take between two turns."""
        super().__init__(engines, stall_s=stall_s, say=say)
        self._function = function
        self._name = name
        self._tokenizer = copy.deepcopy(tokenizer)  # fast tokenizers are not to be used by two threads at once
        self._vocabulary = len(tokenizer)
        self._timeout_s = timeout_s
        self._conversations: dict[str, Conversation] = {}
        """In the making, by the id of the completion."""
        self._ended: list[Conversation] = []
        """Those of them that are over and wait for a turn that nobody reads any more."""
        self._turns: dict[str, Conversation] = {}
        """Turns that are being sampled, by the request's id."""
        self._asked: SimpleQueue[tuple[Conversation, Request | None]] = SimpleQueue()
        """From the loop: the next turn of a conversation, or that it has its result."""
        self._lives = 0
        self._told = False
        self._loop: _Loop

    def __enter__(self) -> "ConversationPool":
        self._loop = _Loop()
        super().__enter__()
        return self

    def close(self) -> None:
        self._loop.close()
        super().close()

    @property
    def open(self) -> int:
        """Completions asked for and not yet handed out."""
        return len(self._conversations)

    def submit(self, requests: Sequence[Request]) -> None:
        """Begins the conversations of one group."""
        for request in requests:
            assert request.id not in self._conversations, f"{request.id} was asked for twice"
            self._begin(request)

    def poll(self, timeout_s: float) -> list[Completion]:
        """Completions whose conversation is over; waits at most `timeout_s` for the first. Raises what a RolloutPool's raises."""
        deadline = time.monotonic() + timeout_s
        while True:
            done = self._hear()
            left_s = deadline - time.monotonic()
            if done or left_s <= 0:
                return done
            for turn in super().poll(min(TURN_s, left_s)):
                self._take(turn)
            if self._conversations and self._loop.silence() > self._timeout_s:
                self._leave_loop()

    def _begin(self, request: Request) -> None:
        def want(turn: Request | None) -> None:
            self._asked.put((conversation, turn))

        conversation = Conversation(request, self._lives, self._vocabulary, self._name, self._timeout_s, want)
        self._conversations[request.id] = conversation
        self._loop.start(conversation, conversation.run(self._function, Generate(conversation, self._tokenizer)))

    def _hear(self) -> list[Completion]:
        """Takes in what conversations want; gives the completions of those that are over."""
        while not self._asked.empty():
            conversation, turn = self._asked.get()
            if self._conversations.get(conversation.request.id) is not conversation or conversation in self._ended:
                continue  # of a loop that was left behind
            if turn is None:
                self._ended.append(conversation)
            else:
                self._turns[turn.id] = conversation
                super().submit([turn])
        # An engine that still samples for one of them could not be updated.
        busy = {conversation.request.id for conversation in self._turns.values()} if self._ended else set()
        over = [conversation for conversation in self._ended if conversation.request.id not in busy]
        self._ended = [conversation for conversation in self._ended if conversation.request.id in busy]
        done = []
        for conversation in over:
            del self._conversations[conversation.request.id]
            assert conversation.result is not None
            done.append(conversation.result)
            self._tell(conversation.result)
        return done

    def _tell(self, completion: Completion) -> None:
        if completion.failed is not None and not self._told:
            self._told = True
            self._say(f"a completion failed in {completion.failed.detail} (others that fail are counted, and not told one by one)")

    def _take(self, turn: Completion) -> None:
        conversation = self._turns.pop(turn.id)
        if self._conversations.get(conversation.request.id) is not conversation or conversation in self._ended:
            self._lost_tokens += len(turn.token_ids)  # it has failed since, or was begun again
        else:
            self._loop.call(conversation.answer, turn)

    def _leave_loop(self) -> None:
        """Goes on without the thread that a function blocks."""
        blocked, self._loop = self._loop, _Loop()
        self._lives += 1
        waiting = [c for c in self._conversations.values() if c not in self._ended]
        at_work = [c for c in waiting if c.task is not None and c.task is blocked.task()]
        guilty = at_work or [c for c in waiting if c.task is not None and c.pending is None]
        why = f"blocked its thread for more than {self._timeout_s:g} s (rollout.conversation_timeout_s), at {blocked.place()}"
        self._say(f"conversation {self._name} {why}; what blocks belongs in asyncio.to_thread")
        blocked.close(wait_s=0.0)
        for conversation in waiting:
            if conversation in guilty:
                conversation.fail("timeout", why)
                self._ended.append(conversation)
            else:
                self._begin(conversation.request)


class _Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._beats = self._heard = 0
        self._silent_s = 0.0
        self._looked = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="conversations", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._beat()
        self._loop.run_forever()

    def _beat(self) -> None:
        self._beats += 1
        self._loop.call_later(BEAT_s, self._beat)

    def start(self, conversation: Conversation, work: Coroutine[Any, Any, None]) -> None:
        def begin() -> None:
            conversation.task = task = self._loop.create_task(work)
            self._tasks.add(task)  # the loop itself would let it be collected
            task.add_done_callback(self._tasks.discard)

        self.call(begin)

    def call(self, function: Callable[..., None], *values: Any) -> None:
        self._loop.call_soon_threadsafe(function, *values)

    def silence(self) -> float:
        """Seconds without a beat; of two looks that lie far apart a second counts, as then it is this process that stood still."""
        now, beats = time.monotonic(), self._beats
        self._silent_s = 0.0 if beats != self._heard else self._silent_s + min(now - self._looked, 1.0)
        self._looked, self._heard = now, beats
        return self._silent_s

    def task(self) -> "asyncio.Task[Any] | None":
        """What it is at work on."""
        return asyncio.current_task(self._loop)

    def place(self) -> str:
        """The line that it is at."""
        assert self._thread.ident is not None
        frames = traceback.extract_stack(sys._current_frames().get(self._thread.ident))
        return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "an unknown line"

    def close(self, wait_s: float = CLOSE_s) -> None:
        """Cancels what there is and waits so long for it; a thread that is blocked ends when it can. May be called twice."""

        def end() -> None:
            for task in self._tasks:
                task.cancel()
            self._ending = self._loop.create_task(self._end(list(self._tasks)))

        with suppress(RuntimeError):  # closed before
            self.call(end)
            self._thread.join(wait_s)
            if not self._thread.is_alive():
                self._loop.close()

    async def _end(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        await asyncio.gather(*tasks, return_exceptions=True)
        self._loop.stop()

"""Several turns and tools: a completion that the policy writes in part, and a program the rest.

`rollout.conversation` names an async function. Each call of `generate` is a turn of the policy, which goes on from the token ids so
far; what the function appends between two turns, such as the output of a tool, is read by the policy and never trained on. It
returns all token ids, and the mask of those that the policy wrote:

    async def ask_once(generate, prompt):
        turn = await generate(stop=["</calc>"])
        token_ids, mask = turn.token_ids, [1] * len(turn.token_ids)
        if turn.stop:                                                  # not ended otherwise
            result = generate.encode(await look_up(turn.text, prompt.columns))
            last = await generate(token_ids + result)
            token_ids, mask = token_ids + result + last.token_ids, mask + [0] * len(result) + [1] * len(last.token_ids)
        return token_ids, mask

A completion is one line of tokens: each turn goes on from all there was before, and what was sampled can be neither left out nor
changed. That is held against what the engines gave, here, so that the learner's log-probs are of what the policy did. All of it has at
most `rollout.max_tokens`; where nothing is left for a turn, `generate` does not come back and the completion ends there, cut off.

The function is not to block its thread, which all conversations of a run share: what blocks belongs in `asyncio.to_thread`, with a time
limit of its own. What goes wrong in it is no verdict on the policy: that completion has failed, and teaches nothing. A mistake of the
policy's, such as a call that makes no sense, is another thing: the function is to answer it.
"""

import asyncio
import hashlib
import operator
import traceback
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from data.values import Completion, Prompt, Score
from rl.engines.base import Request

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Function = Callable[["Generate", Prompt], Awaitable[Any]]
"""What a recipe names: gives token ids and their mask."""


@dataclass(frozen=True)
class Turn:
    """What the policy wrote in one turn."""

    token_ids: list[int]
    text: str
    """Without special tokens."""
    finish_reason: Literal["stop", "length"]
    """`length`: cut off, by the turn's own limit or because the completion is at its end."""
    stop: str | None
    """The string that ended it, of those that `generate` was given; None if something else did."""


class OutOfTokens(BaseException):
    """A completion has no room for another turn. Like a cancellation, no `except Exception` of a function catches it."""


class Generate:
    """What a function calls for the policy's next turn; the tokenizer's two directions are at hand."""

    def __init__(self, conversation: "Conversation", tokenizer: "PreTrainedTokenizerBase"):
        self._conversation = conversation
        self._tokenizer = tokenizer

    @property
    def max_tokens(self) -> int:
        """Longest completion, in tokens."""
        return self._conversation.request.sampling.max_tokens

    def encode(self, text: str) -> list[int]:
        """Token ids of a text by itself, without the special tokens that a tokenizer would put around it."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, token_ids: Sequence[int]) -> str:
        """With all special tokens."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))

    async def __call__(self, token_ids: Iterable[int] = (), *, stop: str | Sequence[str] = (), max_tokens: int | None = None) -> Turn:
        """The next turn. token_ids: the completion so far, with what is appended to it; stop: strings that end the turn beside
        `rollout.stop`, their tokens stay in it; max_tokens: of this turn. ValueError if `token_ids` are not what was sampled."""
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        completion = await self._conversation.turn(token_ids, stops, max_tokens)
        assert completion.finish_reason != "abort", "nobody interrupts a turn"
        ids = completion.token_ids.tolist()
        ended = self.decode(ids) if stops and completion.finish_reason == "stop" else ""
        text = str(self._tokenizer.decode(ids, skip_special_tokens=True))
        return Turn(ids, text, completion.finish_reason, next((s for s in stops if s in ended), None))


class Conversation:
    """One completion in the making. What is asked, and what came of it, is in the thread of the functions."""

    def __init__(self, request: Request, life: int, vocabulary: int, name: str, timeout_s: float, want: Callable[[Request | None], None]):
        """life: sets its turns apart from those of an earlier try. vocabulary: token ids are below it. name: of the function. want: takes
        a turn that is to be sampled, or None when `result` is there."""
        self.request = request
        self.life = life
        self.vocabulary = vocabulary
        self.name = name
        self.timeout_s = timeout_s
        self.want = want
        self.token_ids: list[int] = []
        self.mask: list[int] = []
        self.turns: list[tuple[int, Completion]] = []
        """With the place of its first token."""
        self.pending: asyncio.Future[Completion] | None = None
        """The turn that is being sampled."""
        self.task: asyncio.Task[None] | None = None
        self.result: Completion | None = None
        self._clock: asyncio.TimerHandle | None = None
        """Goes while the function is at work, and stands while a turn is sampled: what engines take is no fault of the function's."""

    # --- turns --------------------------------------------------------------------------------------------------------

    async def run(self, function: Function, generate: Generate) -> None:
        """Calls the function; `result` is then the completion, whole or failed."""
        prompt = self.request.prompt
        assert prompt is not None, f"{self.request.id} was asked for without its prompt"
        self._start_clock()
        try:
            self._end(await function(generate, prompt))
        except OutOfTokens:
            self.result = self.result or self._completion("length")
        except (Exception, SystemExit, asyncio.CancelledError) as error:  # noqa: BLE001 - of a function from outside
            self.fail("error", _said(error))
        self._stop_clock()
        self.want(None)

    def _start_clock(self) -> None:
        self._clock = asyncio.get_running_loop().call_later(self.timeout_s, self._late)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()

    def _late(self) -> None:
        """Its time is up; whether the function lets itself be cancelled or not, nobody waits for it."""
        self.fail("timeout", f"took more than {self.timeout_s:g} s between two turns (rollout.conversation_timeout_s)")
        self.want(None)
        assert self.task is not None
        self.task.cancel()

    async def turn(self, token_ids: Iterable[int], stop: tuple[str, ...], max_tokens: int | None) -> Completion:
        """Samples on from `token_ids`; OutOfTokens if there is no room."""
        if self.result is not None:
            raise ValueError("generate was called after the completion had failed")
        if self.pending is not None:
            raise ValueError("generate was called while a turn was being sampled: a completion is one line of tokens")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"generate was asked for a turn of max_tokens {max_tokens}")
        self._extend(token_ids)
        room = self.request.sampling.max_tokens - len(self.token_ids)
        if room <= 0:
            await asyncio.sleep(0)  # one that catches this and asks again for ever still comes to its time limit
            raise OutOfTokens
        wanted = self.request.sampling
        sampling = replace(wanted, max_tokens=min(room, max_tokens or room), stop=(*wanted.stop, *stop))
        number = len(self.turns)
        self.pending = asyncio.get_running_loop().create_future()
        self._stop_clock()
        self.want(
            replace(
                self.request, group_id=f"{self.request.id}@{self.life}.{number}", index=0, seed=turn_seed(self.request.seed, number),
                prompt_ids=np.concatenate([self.request.prompt_ids, np.asarray(self.token_ids, np.int32)]).astype(np.int32),
                sampling=sampling, prompt=None,
            )
        )  # fmt: skip
        try:
            completion = await asyncio.shield(self.pending)
        except asyncio.CancelledError:  # the function waits no longer
            self._start_clock()
            raise
        self._start_clock()
        return completion

    def answer(self, completion: Completion) -> None:
        """The turn that was asked for is there."""
        assert self.pending is not None
        self.turns.append((len(self.token_ids), completion))
        self.token_ids += completion.token_ids.tolist()
        self.mask += completion.mask.tolist()
        pending, self.pending = self.pending, None
        pending.set_result(completion)

    def _extend(self, token_ids: Iterable[int]) -> None:
        """Takes in what was appended since the last turn; ValueError if what was before is not the same."""
        ids = [operator.index(token) for token in token_ids]
        known = len(self.token_ids)
        if ids[:known] != self.token_ids:
            at = next((i for i, (a, b) in enumerate(zip(ids, self.token_ids, strict=False)) if a != b), len(ids))
            raise ValueError(f"its token ids are not those that were sampled: of {known} so far, the one at {at} is another or missing")
        strange = next((token for token in ids[known:] if not 0 <= token < self.vocabulary), None)
        if strange is not None:
            raise ValueError(f"it appended token {strange}; the tokenizer knows 0 to {self.vocabulary - 1}")
        self.token_ids = ids
        self.mask += [0] * (len(ids) - known)

    # --- the end ------------------------------------------------------------------------------------------------------

    def _end(self, given: Any) -> None:
        """Holds what the function returned against what was sampled."""
        if self.result is not None:
            return  # it was late
        if not isinstance(given, tuple) or len(given) != 2:
            raise ValueError(f"it returned {type(given).__name__} {given!r:.40}; it is to return token ids and their mask")
        if self.pending is not None:
            raise ValueError("it returned while a turn was being sampled")
        self._extend(given[0])
        mask = [operator.index(bit) for bit in given[1]]
        if not self.turns:
            raise ValueError("it returned without a turn of the policy")
        if mask != self.mask:
            at = next((i for i, (a, b) in enumerate(zip(mask, self.mask, strict=False)) if a != b), min(len(mask), len(self.mask)))
            raise ValueError(
                f"its mask has {len(mask)} entries for {len(self.mask)} tokens, or is wrong at {at}: it is 1 where the policy wrote a "
                "token, and 0 elsewhere"
            )
        begin, last = self.turns[-1]
        if len(self.token_ids) > self.request.sampling.max_tokens:
            self.result = self._completion("length")
        else:
            whole = len(self.token_ids) == begin + len(last.token_ids)
            self.result = self._completion(last.finish_reason if whole else "stop")

    def fail(self, status: Literal["error", "timeout"], why: str) -> None:
        """Ends it, unless it has ended."""
        if self.result is not None:
            return
        failed = Score(None, status, detail=f"rollout.conversation {self.name}: {why}")
        self.result = replace(self._completion("abort"), routes=None, routes_valid=None, failed=failed)

    def _completion(self, finish_reason: Literal["stop", "length", "abort"]) -> Completion:
        """The turns as one completion, cut off at its longest. A token that the policy did not write has no log-prob, and the version of
        the turn before it."""
        tokens = min(len(self.token_ids), self.request.sampling.max_tokens)
        logp_T, version_T = np.full(tokens, np.nan, np.float32), np.zeros(tokens, np.int32)
        for number, (begin, turn) in enumerate(self.turns):
            end = begin + len(turn.token_ids)
            logp_T[begin:end] = turn.engine_logp
            version_T[begin if number else 0 :] = turn.policy_version[0]
            version_T[begin:end] = turn.policy_version
            version_T[end:] = turn.policy_version[-1]
        routes, valid = self._routes(tokens)
        r = self.request
        return Completion(
            prompt_id=r.prompt_id, group_id=r.group_id, index=r.index, attempt=r.attempt, seed=r.seed,
            token_ids=np.asarray(self.token_ids[:tokens], np.int32), mask=np.asarray(self.mask[:tokens], np.uint8),
            engine_logp=logp_T, policy_version=version_T, finish_reason=finish_reason,
            engine=self.turns[-1][1].engine if self.turns else "", routes=routes, routes_valid=valid,
            drafted=sum(turn.drafted for _, turn in self.turns), drafts_kept=sum(turn.drafts_kept for _, turn in self.turns),
        )  # fmt: skip

    def _routes(self, tokens: int) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Each position's from the first turn that forwarded it, since what was sampled there was sampled by these."""
        known = next((turn.routes for _, turn in self.turns if turn.routes is not None), None)
        if known is None:
            return None, None
        length = len(self.request.prompt_ids) + tokens
        routes_TLK, valid_T = np.zeros((length, *known.shape[1:]), known.dtype), np.zeros(length, bool)
        for _, turn in self.turns:
            if turn.routes is not None and turn.routes_valid is not None:
                new_T = turn.routes_valid & ~valid_T[: len(turn.routes)]
                routes_TLK[: len(new_T)][new_T] = turn.routes[new_T]
                valid_T[: len(new_T)] |= new_T
        return routes_TLK, valid_T


def turn_seed(seed: int, number: int) -> int:
    """A completion's own in its first turn, so that one turn alone is the completion without a conversation; then one for each."""
    if number == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}\nturn {number}".encode(), digest_size=8).digest(), "big") >> 1


def _said(error: BaseException) -> str:
    """One line: what was raised, and where."""
    place = traceback.extract_tb(error.__traceback__)
    where = f" ({place[-1].filename}:{place[-1].lineno})" if place else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"

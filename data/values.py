"""The values that flow between the stages: Prompt, Completion, Score, Group, Record.

They are frozen, they hold numpy arrays and plain Python values, and they know nothing of torch, of an engine or of a file.
Token ids go in and token ids come out: text is never tokenised again for training, so what an engine sampled, what a reward
judged and what the learner raises are the same tokens.

    T  tokens of one completion        L  MoE layers        K  experts a token        G  completions of one prompt
"""

from __future__ import annotations  # so that numpy, a tenth of a second, is not imported for its name

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

Messages = list[dict[str, Any]]
Status = Literal["ok", "unscored", "timeout", "error"]
FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Prompt:
    """One problem, tokenised once."""

    id: str
    """Unique in its file; a row without one is named after its place, `<file stem>-<row>`."""
    prompt: str | Messages
    """What the user wrote: text, or chat messages. Reward functions see it as it stands here."""
    text: str
    """What the policy reads: `prompt` itself, or the chat template's rendering of it with the generation prompt."""
    token_ids: np.ndarray
    """int32 [prompt tokens]."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The row's other columns; they reach reward functions by name."""


@dataclass(frozen=True)
class Completion:
    """One sampled answer, exactly as the engine gave it."""

    prompt_id: str
    group_id: str
    index: int
    """Place in the group, 0 to G-1."""
    attempt: int
    """Counts the groups begun for this prompt in this run, from 0; a completion asked again after an engine's death keeps it."""
    seed: int
    token_ids: np.ndarray
    """int32 [T], without the prompt, with the end-of-text token or the tokens of a stop string."""
    mask: np.ndarray
    """uint8 [T], 1 where the policy wrote the token; `engine_logp` is defined only there."""
    engine_logp: np.ndarray
    """float32 [T], log-probability of each token under the engine, at the sampling temperature."""
    policy_version: np.ndarray
    """int32 [T], the version of the weights that wrote each token."""
    finish_reason: FinishReason
    engine: str
    """Name of the engine that finished it."""
    routes: np.ndarray | None = None
    """Compact integers [prompt tokens + T, L, K]: experts chosen at each position, MoE layers only; the last token has none."""
    routes_valid: np.ndarray | None = None
    """bool [prompt tokens + T], where `routes` holds what the engine really used."""
    failed: Score | None = None
    """Why its conversation (`rollout.conversation`) did not come to an end: the Score it gets, without being judged. It then holds
    what was sampled so far, ends with `abort`, and no journal keeps it."""
    drafted: int = 0
    """Tokens that a drafter proposed for it (`rollout.draft_tokens`); no journal keeps it."""
    drafts_kept: int = 0
    """How many of them the policy took."""

    @property
    def id(self) -> str:
        return completion_id(self.group_id, self.index)


@dataclass(frozen=True)
class Score:
    """What the reward functions say of one completion. An error is never dressed as a 0: `value` is a number only if `status` is ok."""

    value: float | None
    status: Status = "ok"
    parts: Mapping[str, float | None] = field(default_factory=dict)
    """Each part's own value by name, before weights and gates; None where it could not judge or failed."""
    detail: str = ""
    """Why: what failed, or what a part has to say of its verdict."""

    def __post_init__(self) -> None:
        assert (self.value is not None) == (self.status == "ok"), f"a Score has a value exactly if it is ok: {self}"


@dataclass(frozen=True)
class Group:
    """The G completions of one prompt that are judged against each other: a cohort."""

    id: str
    prompt: Prompt
    attempt: int
    completions: tuple[Completion, ...]
    scores: tuple[Score, ...]

    def __post_init__(self) -> None:
        assert len(self.completions) == len(self.scores), f"group {self.id}: {len(self.completions)} completions, {len(self.scores)} scores"


@dataclass(frozen=True)
class Provenance:
    """Where a row of SFT data comes from: enough to sample it again, and to find every row that rests on a reward or an expert."""

    prompt_id: str
    group_id: str
    index: int
    """The completion's place in its group."""
    expert: str
    """Name of the expert that wrote it."""
    expert_hash: str
    """Of the expert's weights."""
    seed: int
    """The completion's own."""
    sampling: Mapping[str, Any]
    """Settings of the engine: temperature, max_tokens, the system prompt it was sampled with, …"""
    rewards: Mapping[str, str]
    """Reward function -> its version."""
    parts: Mapping[str, float | None]
    """Reward function -> what it said, as in Score."""
    reward: float | None
    pass_rate: float | None
    """Share of its group's completions that were right, of those that could be judged."""
    filters: tuple[str, ...]
    """What it passed in cleaning, in order."""
    recipe_hash: str
    tokens: int
    """Tokens of the completion."""
    source: str = ""
    """The prompt file or task."""
    finish_reason: str = "stop"


@dataclass(frozen=True)
class Record:
    """One row of SFT data and where it came from."""

    messages: Messages
    provenance: Provenance


def group_id(run: str, prompt_id: str, attempt: int) -> str:
    """Names a group by run, prompt and attempt."""
    return f"{run}/{prompt_id}/{attempt}"


def completion_id(group_id: str, index: int) -> str:
    return f"{group_id}#{index}"


def completion_seed(run_seed: int, prompt_id: str, attempt: int, index: int) -> int:
    """A seed in [0, 2^63) that depends on these four values alone: not on time, order, engine or batch."""
    digest = hashlib.blake2b(f"{run_seed}\n{prompt_id}\n{attempt}\n{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1

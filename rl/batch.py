"""Groups become flat batches: every token that is forwarded stands once in one long row.

The prompt of a group stands once, its G completions after it; each completion attends to its prompt's keys and values and to
itself (`rl/attention.py`), so nothing is padded and no prompt is forwarded G times. The last token of a completion predicts
nothing and is not forwarded. Losses are defined on the predicted tokens alone, in the same order for every loss.

    T  tokens forwarded      N  predicted tokens (what the policy wrote)      B  completions      S  segments      G  group size

A batch is one forward and backward pass; the batches of one optimizer step share a `Normaliser`, which counts all completions of
that step on all ranks, also those that are not forwarded because they teach nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from data.values import Completion, Group


@dataclass(frozen=True)
class Normaliser:
    """What a step's loss is divided by: counts over all ranks, skipped groups included."""

    completions: float
    tokens: float


@dataclass(frozen=True)
class TrainBatch:
    """One forward and backward pass. Tensors are on the learner's device; segments are plain integers."""

    tokens_T: torch.Tensor
    """int64 [T]."""
    position_T: torch.Tensor
    """int64 [T], place in prompt and completion, from 0."""
    segment_T: torch.Tensor
    """int64 [T], the segment of each token."""
    count_T: torch.Tensor
    """int64 [T], completions a forwarded token stands for: all of the group for a shared prompt, 1 in a completion."""
    bounds_S: tuple[tuple[int, int], ...]
    """Begin and end of each segment in T."""
    segment_of_B: tuple[int, ...]
    prompt_of_B: tuple[int, ...]
    """The segments of a completion and of its prompt; completions may share one prompt."""
    source_N: torch.Tensor
    """int64 [N], the position in T that predicts each token."""
    target_N: torch.Tensor
    """int64 [N], the token that was sampled."""
    completion_N: torch.Tensor
    """int64 [N], which of the B completions it belongs to."""
    engine_logp_N: torch.Tensor
    """float32 [N]."""
    version_N: torch.Tensor
    """int64 [N], the policy version that sampled it."""
    adv_B: torch.Tensor
    """float [B]."""
    length_B: torch.Tensor
    """float [B], predicted tokens of each completion."""
    normaliser: Normaliser
    temperature: float
    """Of sampling; log-probs are taken at it."""
    max_tokens: int
    """Longest completion a group may have; what `dr_grpo` divides by."""
    old_logp_N: torch.Tensor | None = None
    """[N], the learner's log-probs before the first update on these groups; None: the training pass's own."""
    ref_logp_N: torch.Tensor | None = None
    """[N], the reference's log-probs, where the loss has a KL term."""
    routes_TLK: torch.Tensor | None = None
    """Compact integers [T, L, K], experts chosen before at each position; a prompt's are those of its first completion."""
    routes_valid_T: torch.Tensor | None = None
    """bool [T], where `routes_TLK` holds anything."""

    @property
    def completions(self) -> int:
        return len(self.segment_of_B)


@dataclass(frozen=True)
class Item:
    """One completion that is trained on, with its prompt."""

    group: int
    prompt_ids: np.ndarray
    completion: Completion
    advantage: float


def trained(completion: Completion, has_value: bool, mask_truncated: bool) -> bool:
    """Whether a completion enters the loss: it has a score, the policy wrote in it, and DAPO's filter lets it pass."""
    return has_value and bool(completion.mask.any()) and not (mask_truncated and completion.finish_reason == "length")


def items_of(
    groups: Sequence[Group], advantages_PG: torch.Tensor, mask_truncated: bool, skip_zero: bool
) -> tuple[list[list[Item]], Normaliser]:
    """The completions to forward, by group, and what the loss over all of them is divided by.

    With `skip_zero` a group whose advantages are all 0 is left out but counted. That is exact as long as the loss has no other
    term than the policy's: its gradient is a sum of terms that each have the factor A = 0.
    """
    work: list[list[Item]] = []
    completions = tokens = 0
    for number, (group, adv_G) in enumerate(zip(groups, advantages_PG.tolist(), strict=True)):
        items = []
        for completion, score, adv in zip(group.completions, group.scores, adv_G, strict=True):
            completions += score.value is not None
            if trained(completion, score.value is not None, mask_truncated):
                tokens += int(completion.mask.sum())
                items.append(Item(number, group.prompt.token_ids, completion, adv))
        if items and not (skip_zero and all(item.advantage == 0.0 for item in items)):
            work.append(items)
    return work, Normaliser(float(max(completions, 1)), float(max(tokens, 1)))


def forwarded(items: Sequence[Item], share_prompt: bool = True) -> int:
    """Tokens that a pass over these completions of one group forwards."""
    prompts = 1 if share_prompt else len(items)
    return prompts * len(items[0].prompt_ids) + sum(len(item.completion.token_ids) - 1 for item in items)


def split(work: Sequence[list[Item]], micro_tokens: int, ranks: int) -> list[list[list[list[Item]]]]:
    """Spreads groups over passes and ranks: result[rank][pass] is a list of groups, equally many passes on all ranks.

    Longest first, each to the rank with the least so far, then into the fewest passes of at most `micro_tokens`. A group stays
    whole, because its prompt is shared. A rank without work has passes of no groups, which it runs with weight zero.
    """
    order = sorted(range(len(work)), key=lambda i: (-forwarded(work[i]), i))
    shares: list[list[list[Item]]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for i in order:
        rank = loads.index(min(loads))
        shares[rank].append(work[i])
        loads[rank] += forwarded(work[i])
    passes = [_fill(share, micro_tokens) for share in shares]
    most = max(1, *(len(p) for p in passes))
    return [p + [[] for _ in range(most - len(p))] for p in passes]


def _fill(groups: Sequence[list[Item]], micro_tokens: int) -> list[list[list[Item]]]:
    """First fit in the given order: fewest passes of at most `micro_tokens`; a longer group is a pass of its own."""
    passes: list[list[list[Item]]] = []
    room: list[int] = []
    for items in groups:
        size = forwarded(items)
        place = next((i for i, left in enumerate(room) if left >= size), None)
        if place is None:
            passes.append([items])
            room.append(micro_tokens - size)
        else:
            passes[place].append(items)
            room[place] -= size
    return passes


def pack(
    groups: Sequence[list[Item]],
    normaliser: Normaliser,
    *,
    temperature: float,
    max_tokens: int,
    device: torch.device | str = "cpu",
    share_prompt: bool = True,
) -> TrainBatch:
    """One flat batch of these groups. `share_prompt=False` forwards the prompt once for each completion (a baseline).

    Without groups it is a pass of weight zero: one token that predicts nothing, so that sharded parameters gather and reduce on a
    rank without work in step with the others.
    """
    tokens: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    counts: list[int] = []
    bounds: list[tuple[int, int]] = []
    segment_of_B: list[int] = []
    prompt_of_B: list[int] = []
    sources: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    logps: list[np.ndarray] = []
    versions: list[np.ndarray] = []
    advantages: list[float] = []
    spans: list[Span] = []

    def add(ids: np.ndarray, first: int, count: int, of: Completion | None) -> int:
        begin = bounds[-1][1] if bounds else 0
        bounds.append((begin, begin + len(ids)))
        tokens.append(ids)
        positions.append(np.arange(first, first + len(ids)))
        counts.append(count)
        spans.append((of, first, len(ids)))
        return len(bounds) - 1

    for items in groups:
        for mates in [items] if share_prompt else [[item] for item in items]:
            prompt_ids = mates[0].prompt_ids
            prompt = add(prompt_ids, 0, len(mates), mates[0].completion)
            for item in mates:
                done = item.completion
                here = add(done.token_ids[:-1], len(prompt_ids), 1, done)
                segment_of_B.append(here)
                prompt_of_B.append(prompt)
                # The prompt's last token predicts the first of every completion.
                source = np.concatenate([[bounds[prompt][1] - 1], np.arange(*bounds[here])])
                written = done.mask.astype(bool)
                sources.append(source[written])
                targets.append(done.token_ids[written])
                logps.append(done.engine_logp[written])
                versions.append(done.policy_version[written])
                advantages.append(item.advantage)

    if not groups:
        add(np.zeros(1, dtype=np.int64), 0, 0, None)

    def flat(parts: Sequence[np.ndarray], dtype: torch.dtype) -> torch.Tensor:
        joined = np.concatenate(parts) if parts else np.zeros(0)
        return torch.as_tensor(joined).to(device=device, dtype=dtype)

    lengths = [len(t) for t in targets]
    sizes = [end - begin for begin, end in bounds]
    routes, valid = _routes(spans)
    return TrainBatch(
        tokens_T=flat(tokens, torch.int64),
        position_T=flat(positions, torch.int64),
        segment_T=flat([np.repeat(np.arange(len(sizes)), sizes)], torch.int64),
        count_T=flat([np.repeat(np.asarray(counts, dtype=np.int64), sizes)], torch.int64),
        bounds_S=tuple(bounds),
        segment_of_B=tuple(segment_of_B),
        prompt_of_B=tuple(prompt_of_B),
        source_N=flat(sources, torch.int64),
        target_N=flat(targets, torch.int64),
        completion_N=flat([np.repeat(np.arange(len(lengths)), lengths)], torch.int64),
        engine_logp_N=flat(logps, torch.float32),
        version_N=flat(versions, torch.int64),
        adv_B=torch.tensor(advantages, dtype=torch.float64, device=device),
        length_B=torch.tensor(lengths, dtype=torch.float64, device=device),
        normaliser=normaliser,
        temperature=temperature,
        max_tokens=max_tokens,
        routes_TLK=None if routes is None else torch.from_numpy(routes).to(device),
        routes_valid_T=None if valid is None else torch.from_numpy(valid).to(device),
    )


Span = tuple[Completion | None, int, int]
"""A segment's completion (of a prompt the first), where it begins in prompt and completion, and its length."""


def _routes(spans: Sequence[Span]) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Routes [T, L, K] and where they are valid [T]; None where no completion came with any."""
    known = next((c.routes for c, _, _ in spans if c is not None and c.routes is not None), None)
    if known is None:
        return None, None
    total = sum(length for _, _, length in spans)
    routes, valid = np.zeros((total, *known.shape[1:]), known.dtype), np.zeros(total, bool)
    begin = 0
    for completion, first, length in spans:
        if completion is not None and completion.routes is not None and completion.routes_valid is not None:
            routes[begin : begin + length] = completion.routes[first : first + length]
            valid[begin : begin + length] = completion.routes_valid[first : first + length]
        begin += length
    return routes, valid

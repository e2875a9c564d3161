"""Which completions of a group are kept for training: rejection sampling's rejection. Pure functions of Groups.

A rule ranks the completions of one group that it would keep, best first. A failed Score is neither right nor wrong: its completion
is not chosen, and the group's pass rate does not count it. Ties are broken by a hash of seed and completion, so that the choice
depends on no order, and length or place gain nothing from a tie.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from data.recipe import Section
from data.values import Completion, Group, completion_id

RuleName = Literal["all_correct", "best_of_n", "top_k", "shortest_correct", "diverse", "majority"]
Answers = Callable[[Group], Sequence[str | None]]
"""The final answer of each completion of a group, None where it gives none; what `majority` votes on."""


class SelectConfig(Section):
    """The `select` section of a recipe."""

    rule: RuleName = "all_correct"
    """all_correct; best_of_n: the one of the highest reward; top_k: the k of the highest; shortest_correct: the k right ones of
    fewest tokens; diverse: k right ones, far from each other; majority: k of those that give the most frequent answer."""
    k: int = Field(1, ge=1)
    """For top_k, shortest_correct, diverse and majority."""
    correct_at: float = 1.0
    """A reward from which a completion is right."""
    pass_rate: tuple[float, float] | None = None
    """Groups with a pass rate outside of these bounds are left out; (0.01, 0.99) drops what is never or always solved."""
    max_per_prompt: int | None = Field(None, ge=1)
    """Most completions of one prompt, over all its groups."""
    seed: int = Field(0, ge=0)
    """Breaks ties."""

    @model_validator(mode="after")
    def _possible_window(self) -> "SelectConfig":
        if self.pass_rate is not None and not 0.0 <= self.pass_rate[0] <= self.pass_rate[1] <= 1.0:
            raise ValueError(f"pass_rate {list(self.pass_rate)} is no window: two numbers from 0 to 1, the smaller one first")
        return self


@dataclass(frozen=True)
class Choice:
    """A completion that is kept."""

    group: Group
    index: int

    @property
    def completion(self) -> Completion:
        return self.group.completions[self.index]


@dataclass(frozen=True)
class Pair:
    """Two completions of one prompt, one better than the other."""

    group: Group
    chosen: int
    rejected: int
    margin: float
    """Difference of their rewards."""


def select(groups: Sequence[Group], config: SelectConfig, answers: Answers | None = None) -> list[Choice]:
    """What is kept of some groups, in their order, the best of a group first. `answers` is needed for the rule `majority` alone."""
    if config.rule == "majority" and answers is None:
        raise ValueError("the rule 'majority' needs the answers that it votes on")
    taken: Counter[str] = Counter()
    chosen: list[Choice] = []
    for group in groups:
        if not in_window(group, config):
            continue
        ranked = majority(group, answers(group), config) if config.rule == "majority" and answers else RULES[config.rule](group, config)
        room = len(ranked) if config.max_per_prompt is None else config.max_per_prompt - taken[group.prompt.id]
        chosen += [Choice(group, index) for index in ranked[: max(0, room)]]
        taken[group.prompt.id] += len(ranked[: max(0, room)])
    return chosen


def is_right(group: Group, index: int, config: SelectConfig) -> bool:
    """Whether a completion could be judged and its reward reaches `correct_at`."""
    value = group.scores[index].value
    return value is not None and value >= config.correct_at


def pass_rate(group: Group, config: SelectConfig) -> float | None:
    """Right completions / completions that could be judged; None if none could."""
    judged = [index for index, score in enumerate(group.scores) if score.status == "ok"]
    return sum(is_right(group, index, config) for index in judged) / len(judged) if judged else None


def in_window(group: Group, config: SelectConfig) -> bool:
    """Whether the pass rate lies in the window; a group that could not be judged lies in none."""
    if config.pass_rate is None:
        return True
    rate = pass_rate(group, config)
    return rate is not None and config.pass_rate[0] <= rate <= config.pass_rate[1]


# --- rules: (group, config) -> indices, best first ------------------------------------------------------------------------


def all_correct(group: Group, config: SelectConfig) -> list[int]:
    """Every right completion, the highest reward first."""
    return [index for index in _by_reward(group, config) if is_right(group, index, config)]


def best_of_n(group: Group, config: SelectConfig) -> list[int]:
    """The completion of the highest reward, right or not; none if none could be judged."""
    return _by_reward(group, config)[:1]


def top_k(group: Group, config: SelectConfig) -> list[int]:
    """The k completions of the highest rewards, right or not."""
    return _by_reward(group, config)[: config.k]


def shortest_correct(group: Group, config: SelectConfig) -> list[int]:
    """The k right completions of fewest tokens."""
    return sorted(all_correct(group, config), key=lambda index: len(group.completions[index].token_ids))[: config.k]


def diverse(group: Group, config: SelectConfig) -> list[int]:
    """k right completions: the best one, then each time the one whose nearest chosen one is farthest (max-min distance).

    Distance is 1 - Jaccard similarity of token pairs (Gonzalez' greedy choice; at least half of the best possible minimum).
    """
    right = all_correct(group, config)
    pairs = {index: _token_pairs(group.completions[index]) for index in right}
    chosen = right[:1]
    nearest = {index: _distance(pairs[index], pairs[chosen[0]]) for index in right[1:]}
    while nearest and len(chosen) < config.k:
        farthest = max(nearest, key=lambda index: (nearest[index], -right.index(index)))
        del nearest[farthest]
        chosen.append(farthest)
        nearest = {index: min(distance, _distance(pairs[index], pairs[farthest])) for index, distance in nearest.items()}
    return chosen


def majority(group: Group, answers: Sequence[str | None], config: SelectConfig) -> list[int]:
    """k completions that give the answer most of them give, the highest reward first. It needs no gold: what is unscored votes and
    may be chosen. A completion whose score failed does neither."""
    assert len(answers) == len(group.completions), f"group {group.id}: {len(answers)} answers"
    voters = [i for i, answer in enumerate(answers) if answer is not None and group.scores[i].status in ("ok", "unscored")]
    votes = Counter(answers[index] for index in voters)
    if not votes:
        return []
    winner = max(votes, key=lambda answer: (votes[answer], _tie(config.seed, f"{group.id} {answer}")))
    return [index for index in _by_reward(group, config, voters) if answers[index] == winner][: config.k]


RULES: Mapping[str, Callable[[Group, SelectConfig], list[int]]] = {
    "all_correct": all_correct,
    "best_of_n": best_of_n,
    "top_k": top_k,
    "shortest_correct": shortest_correct,
    "diverse": diverse,
}
"""`majority` alone needs more than group and config."""


# --- pairs for reward models ----------------------------------------------------------------------------------------------


def pairs(groups: Sequence[Group], config: SelectConfig, per_group: int = 1, min_margin: float = 1e-6) -> list[Pair]:
    """Best against worst, second best against second worst, and so on, while rewards differ by `min_margin` or more."""
    found: list[Pair] = []
    for group in groups:
        ranked = _by_reward(group, config)
        for place in range(min(per_group, len(ranked) // 2)):
            chosen, rejected = ranked[place], ranked[-1 - place]
            margin = _value(group, chosen) - _value(group, rejected)
            if margin < min_margin:
                break
            found.append(Pair(group, chosen, rejected, margin))
    return found


def preference_row(pair: Pair, texts: Sequence[str]) -> dict[str, Any]:
    """A pair in trl's preference format, with an explicit prompt; `texts` are those of the group's completions."""
    prompt = pair.group.prompt.prompt
    chosen, rejected = texts[pair.chosen], texts[pair.rejected]
    if isinstance(prompt, str):
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return {
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


# --- ranks and distances --------------------------------------------------------------------------------------------------


def _by_reward(group: Group, config: SelectConfig, among: Sequence[int] | None = None) -> list[int]:
    """Completions that could be judged (or those given), the highest reward first, ties by seed."""
    if among is None:
        among = [index for index, score in enumerate(group.scores) if score.status == "ok"]
    return sorted(among, key=lambda index: (-_value(group, index), _tie(config.seed, completion_id(group.id, index))))


def _value(group: Group, index: int) -> float:
    """The reward; of what is unscored, less than any."""
    value = group.scores[index].value
    return value if value is not None else float("-inf")


def _tie(seed: int, name: str) -> bytes:
    return hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()


def _token_pairs(completion: Completion) -> frozenset[tuple[int, int]]:
    ids = completion.token_ids.tolist()
    return frozenset(zip(ids, ids[1:], strict=False)) or frozenset({(token, token) for token in ids})


def _distance(ours: frozenset[tuple[int, int]], theirs: frozenset[tuple[int, int]]) -> float:
    return 1.0 - len(ours & theirs) / max(1, len(ours | theirs))

"""From what each reward function says of the completions of a group to their Scores.

A Score is the weighted sum of its parts, each within its `clip`. A part that could not judge is left out of the sum; if none could,
the Score is unscored. A gate passes at 1 or more: below, the part it guards counts 0; where the gate could not judge, nor could the
part. Anything that failed makes the Score fail: an error is never a number. A shadow is logged and changes nothing.

    clip, gate -> (normalised within the group, where the recipe says so) -> weight -> sum
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

from data.values import Score, Status
from rewards.config import PartConfig


@dataclass(frozen=True)
class Outcome:
    """What one reward function says of one completion, or how it failed."""

    value: float | None
    status: Status = "ok"
    detail: str = ""
    """For `timeout` and `error`: the part's key, a colon, and what happened; else what the function has to say of its verdict."""

    @property
    def failed(self) -> bool:
        return self.status in ("timeout", "error")


@dataclass
class _Judged:
    """One completion between its outcomes and its Score."""

    values: dict[str, float | None]
    """As the functions said; what is logged."""
    counted: dict[str, float]
    """What enters the sum, before weights."""
    notes: list[str]
    failures: list[Outcome]


NORMALIZE_EPS = 1e-4


def combine(parts: Sequence[PartConfig], outcomes: Mapping[str, Outcome]) -> Score:
    """The Score of one completion by itself; `outcomes` holds every part and gate by key."""
    return combine_group(parts, [outcomes])[0]


def combine_group(
    parts: Sequence[PartConfig], outcomes: Sequence[Mapping[str, Outcome]], shadows: Collection[str] = (), normalize: bool = False
) -> list[Score]:
    """The Scores of a group's completions; each has its outcomes by key, those of `shadows` included."""
    group = [_judge(parts, each, shadows) for each in outcomes]
    if normalize:
        for part in parts:
            _normalize([one.counted for one in group if not one.failures and part.key in one.counted], part.key)
    return [_score(parts, one) for one in group]


def _judge(parts: Sequence[PartConfig], outcomes: Mapping[str, Outcome], shadows: Collection[str]) -> _Judged:
    values = {key: outcome.value for key, outcome in outcomes.items()}
    failures = [outcome for key, outcome in outcomes.items() if outcome.failed and key not in shadows]
    notes = [f"(shadow) {outcome.detail}" for key, outcome in outcomes.items() if outcome.failed and key in shadows]
    counted: dict[str, float] = {}
    for part in parts if not failures else ():
        value = values[part.key]
        gate = values[part.requires] if part.requires else 1.0
        if gate is None:
            value = None
            notes.append(f"{part.key}: unscored, as its gate {part.requires} could not judge")
        elif gate < 1.0:
            value = 0.0
            notes.append(f"{part.key}: counts 0, as its gate {part.requires} gave {gate:g}")
        elif value is None:
            notes.append(f"{part.key}: could not judge")
        else:
            value = _clipped(value, part.clip)
        if value is not None and part.weight:  # weight 0 is scored and logged, and judges nothing
            counted[part.key] = value
    notes += [f"{key}: {outcome.detail}" for key, outcome in outcomes.items() if outcome.detail and not outcome.failed]
    return _Judged(values, counted, notes, failures)


def _clipped(value: float, bounds: tuple[float | None, float | None] | None) -> float:
    low, high = bounds or (None, None)
    value = value if low is None else max(low, value)
    return value if high is None else min(high, value)


def _normalize(counted: Sequence[dict[str, float]], key: str) -> None:
    """GDPO (arXiv:2601.05242): a part against its own group, over the completions that it judged; equal values give exactly 0."""
    values = [each[key] for each in counted]
    mean, std = (fmean(values), pstdev(values)) if values else (0.0, 0.0)
    for each in counted:
        each[key] = (each[key] - mean) / (std + NORMALIZE_EPS) if min(values) < max(values) else 0.0


def _score(parts: Sequence[PartConfig], judged: _Judged) -> Score:
    if judged.failures:
        detail = "; ".join(outcome.detail for outcome in judged.failures)
        return Score(None, judged.failures[0].status, judged.values, detail)
    if not judged.counted:
        return Score(None, "unscored", judged.values, "; ".join(judged.notes))
    total = sum(part.weight * judged.counted[part.key] for part in parts if part.key in judged.counted)
    return Score(float(total), "ok", judged.values, "; ".join(judged.notes))

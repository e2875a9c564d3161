"""From what each reward function says of a completion to its Score.

A Score is the weighted sum of its parts. A part that could not judge is left out of the sum; if none could, the Score is unscored.
A gate passes at 1 or more: below, the part it guards counts 0; where the gate could not judge, nor could the part. Anything that
failed makes the Score fail: an error is never a number.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data.values import Score, Status
from rewards.config import PartConfig


@dataclass(frozen=True)
class Outcome:
    """What one reward function says of one completion, or how it failed."""

    value: float | None
    status: Status = "ok"
    detail: str = ""
    """For `timeout` and `error`: the function's name, a colon, and what happened."""

    @property
    def failed(self) -> bool:
        return self.status in ("timeout", "error")


def combine(parts: Sequence[PartConfig], outcomes: Mapping[str, Outcome]) -> Score:
    """The Score of one completion; `outcomes` holds every part and gate by name."""
    values = {name: outcome.value for name, outcome in outcomes.items()}
    failures = [outcome for outcome in outcomes.values() if outcome.failed]
    if failures:
        return Score(None, failures[0].status, values, "; ".join(outcome.detail for outcome in failures))
    total, judged, notes = 0.0, False, []
    for part in parts:
        value = values[part.name]
        gate = values[part.requires] if part.requires else 1.0
        if gate is None:
            value = None
            notes.append(f"{part.name}: unscored, as its gate {part.requires} could not judge")
        elif gate < 1.0:
            value = 0.0
            notes.append(f"{part.name}: counts 0, as its gate {part.requires} gave {gate:g}")
        elif value is None:
            notes.append(f"{part.name}: could not judge")
        if value is not None and part.weight:  # weight 0 is scored and logged, and judges nothing
            total += part.weight * value
            judged = True
    return Score(total, "ok", values, "; ".join(notes)) if judged else Score(None, "unscored", values, "; ".join(notes))

"""Alarms: numbers and messages that say when a reward is being gamed, from the groups of each step.

    shadow   the reward has risen and a shadow has fallen since the start, each in its own standard deviations
    length   completions have become much longer or shorter than they were
    format   a format reward has fallen from its best level
    answer   one answer is given to most prompts

A mean of the last WINDOW steps is compared with that of the first WINDOW; before, nothing is said. An alarm speaks once when it
begins and is silent until it has ended. The state is plain JSON, so that a resumed run says what one that was never stopped says.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

from data.values import Completion, Group
from rewards.answers import find_answer
from rewards.numbers import plain

WINDOW = 5
"""Steps of a mean."""
PARTED = 0.5
"""Standard deviations by which the reward must have risen, and a shadow fallen."""
LENGTH_RATIO = 2.0
FORMAT_DROP = 0.2
SAME_ANSWER = 0.5
"""Share of all answers."""
FEWEST_PROMPTS = 4
"""Prompts in a step, below which one answer to all may be right."""
FORMATS = ("think_format", "tag_count", "json_schema", "regex")
"""Parts that count as format."""


@dataclass(frozen=True)
class Report:
    """What a step gave rise to."""

    metrics: dict[str, float]
    """`alarm/…`, for the row of the step."""
    messages: list[str]
    """One line for each alarm that began."""


class Alarms:
    """`shadows`: keys of `rewards.shadow`; `state`: what `state` gave at the checkpoint, or nothing."""

    def __init__(self, shadows: Sequence[str], state: dict[str, Any] | None = None) -> None:
        self._shadows = list(shadows)
        self._first: dict[str, list[list[float]]] = (state or {}).get("first", {})
        """By number: mean and standard deviation of each of the first steps in which it was seen."""
        self._last: dict[str, list[float]] = (state or {}).get("last", {})
        self._best: dict[str, float] = (state or {}).get("best", {})
        self._ringing: set[str] = set((state or {}).get("ringing", []))

    def state(self) -> dict[str, Any]:
        """As JSON, for the checkpoint."""
        return {"first": self._first, "last": self._last, "best": self._best, "ringing": sorted(self._ringing)}

    def step(self, groups: Sequence[Group], text: Callable[[Completion], str]) -> Report:
        """Takes a step's groups; `text` gives a completion's text."""
        scores = [score for group in groups for score in group.scores]
        self._note("reward", (score.value for score in scores))
        self._note("length", (float(c.mask.sum()) for group in groups for c in group.completions))
        names = [name for name in dict.fromkeys(name for score in scores for name in score.parts) if name in (*self._shadows, *FORMATS)]
        for name in names:
            self._note(name, (score.parts.get(name) for score in scores))
        report = Report({}, [])
        for name in self._shadows:
            self._check_shadow(name, report)
        self._check_length(report)
        for name in FORMATS:
            self._check_format(name, report)
        self._check_answer(groups, text, report)
        return report

    def _note(self, name: str, values: Iterable[float | None]) -> None:
        known = [value for value in values if value is not None]
        if not known:
            return
        if len(self._first.setdefault(name, [])) < WINDOW:
            self._first[name].append([fmean(known), pstdev(known)])
        self._last[name] = [*self._last.get(name, []), fmean(known)][-WINDOW:]

    def _moved(self, name: str) -> float | None:
        """By how many standard deviations of a single completion the mean has moved since the start."""
        if len(self._first.get(name, [])) < WINDOW:
            return None
        start, deviation = (fmean(column) for column in zip(*self._first[name], strict=True))
        return (fmean(self._last[name]) - start) / (deviation + 1e-6)

    def _check_shadow(self, name: str, report: Report) -> None:
        reward, shadow = self._moved("reward"), self._moved(name)
        if reward is None or shadow is None:
            return
        report.metrics[f"alarm/shadow_gap/{name}"] = reward - shadow
        said = f"the reward has risen by {reward:.1f} standard deviations, the shadow {name} has fallen by {-shadow:.1f}"
        self._ring(f"shadow/{name}", reward > PARTED and shadow < -PARTED, said, report)

    def _check_length(self, report: Report) -> None:
        if len(self._first.get("length", [])) < WINDOW:
            return
        start, now = fmean(mean for mean, _ in self._first["length"]), fmean(self._last["length"])
        ratio = now / max(start, 1e-6)
        report.metrics["alarm/length_ratio"] = ratio
        is_far = ratio > LENGTH_RATIO or ratio < 1.0 / LENGTH_RATIO
        self._ring("length", is_far, f"completions have {now:.0f} tokens, {ratio:.2f} times the {start:.0f} of the start", report)

    def _check_format(self, name: str, report: Report) -> None:
        if name in self._shadows or len(self._first.get(name, [])) < WINDOW:
            return
        now = fmean(self._last[name])
        self._best[name] = max(now, self._best.get(name, now))
        drop = self._best[name] - now
        report.metrics[f"alarm/format_drop/{name}"] = drop
        self._ring(f"format/{name}", drop > FORMAT_DROP, f"{name} is {now:.2f}, and was {self._best[name]:.2f}", report)

    def _check_answer(self, groups: Sequence[Group], text: Callable[[Completion], str], report: Report) -> None:
        found = [find_answer(text(c), group.prompt.text) for group in groups for c in group.completions]
        answers = Counter("".join(plain(answer).split()) for answer in found if answer is not None)
        if not answers or len({group.prompt.id for group in groups}) < FEWEST_PROMPTS:
            return
        (answer, count), total = answers.most_common(1)[0], answers.total()
        report.metrics["alarm/same_answer"] = count / total
        said = f"{count} of {total} answers of this step are {answer!r:.40}"
        self._ring("answer", count > SAME_ANSWER * total, said, report)

    def _ring(self, name: str, rings: bool, said: str, report: Report) -> None:
        report.metrics[f"alarm/{name}"] = float(rings)
        if rings and name not in self._ringing:
            report.messages.append(f"alarm: {said}; look at the completions before you trust the curve")
        (self._ringing.add if rings else self._ringing.discard)(name)

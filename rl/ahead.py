"""The GroupStream that samples ahead: engines go on while the learner learns, and no group is trained that is too old.

A group is begun under some version of the weights, and its age at step s is s minus the version of its oldest token; step s trains
none that is older than k = `rollout.max_staleness`. Two rules keep that without throwing anything away:

    no more groups are in the making than the steps will take until the first of them is too old, and
    a step waits for those that would be too old for the next one.

So what is slow is waited for and not lost, and long completions are trained as often as short ones. What is too old all the same (an
engine died, a run was resumed) is dropped, counted, and its prompt is asked again.

Without `rollout.oversample` the groups of the next step are in the making while the learner learns from those of this one. With it there
are more than a step takes: it takes those that are ready first, and the slowest go on into the next step. Which groups meet in a step
then depends on time; that each has one end does not.

Nothing here is a thread. `turn` does what can be done now; `Pump` calls it while the learner learns, `next` while the learner waits.

    P  groups a step      s  step, and version of the weights that it trains      k  max_staleness
"""

import math
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.journal import Slot
from data.journal_sums import ABORTED, FAILED, STALE, ZERO_ADVANTAGE
from data.values import Group, Prompt
from rl.metrics import teaches
from rl.stream import POLL_S, Ended, GroupStream, RunStopped, _Begun, _Step, has_failed, sampled_tokens

PAUSE_S = 0.005
"""Between two turns of the pump that found nothing to do."""


@dataclass
class _Place:
    """A place in the prompt stream whose group no step has taken yet."""

    slot: Slot
    """Of the group begun last, or to be begun."""
    prompt: Prompt
    version: int
    """No token of the group is older."""
    failures: int = 0
    """Groups here that could not be scored."""
    begun: bool = False
    group: Group | None = None
    """Sampled and scored."""


class AheadStream(GroupStream):
    """`next` as GroupStream's; between two calls, whoever calls `turn` gets the next groups made."""

    def __init__(self, *arguments: Any, steps: int, **named: Any):
        """steps: of the run; nothing is begun that no step would take. The others are GroupStream's."""
        super().__init__(*arguments, **named)
        self.steps = steps
        self.version = 0
        """Of the weights that the engines have."""
        self.failure: BaseException | None = None
        """What ended the pump; whoever calls `turn` next gets it."""
        self._places: dict[int, _Place] = {}
        """By position, oldest first."""
        self._ready: list[int] = []
        """Positions of groups that are ready, in the order in which they became so."""
        self._now = _Step()
        """What happened since the last hand-over."""
        self._put_off = 0
        """Groups that made room for others since then, because they taught nothing."""
        self._given_up = 0
        """Places that could not be scored since then."""
        self._count_wanted = 0
        """P, known with the first `next`, or from the checkpoint that a run goes on from."""
        self._handed_over = False
        """Whether the groups of `step` have been."""
        self._filling = True
        """Whether new groups are begun."""

    # --- what a step takes --------------------------------------------------------------------------------------------

    def next(self, count: int) -> list[Group]:
        """Groups of `count` prompts, sampled and scored, none of them older than `rollout.max_staleness`, in the order of the prompts.

        Raises RunStopped if too many scores failed, or as many prompts as a step takes had none in all their attempts; EngineDead if
        engines keep dying.
        """
        with self.lock:
            self._count_wanted = count
            while (taken := self._choose(count)) is None:
                began = time.perf_counter()
                sampling = bool(self.begun)
                self.turn(POLL_S)
                taken_s = time.perf_counter() - began
                self._now.rollout_s += taken_s if sampling else 0.0
                self._now.reward_s += 0.0 if sampling else taken_s
            self._hand_over(taken)
            return self.handed

    def _choose(self, count: int) -> list[int] | None:
        """Positions that this step takes; None while it has to wait."""
        self._drop_stale()
        due = self._due(count)
        if any(self._places[n].group is None for n in due):
            return None
        taken = due + [n for n in self._ready if n not in due]
        return taken[:count] if len(taken) >= count else None

    def _due(self, count: int) -> list[int]:
        """Positions of groups that would be too old for the next step."""
        return [n for n, place in self._places.items() if place.version + self.config.max_staleness <= self.step][:count]

    def _hand_over(self, taken: Collection[int]) -> None:
        groups = [self._places.pop(n).group for n in sorted(taken)]
        self._ready = [n for n in self._ready if n not in taken]
        self.handed = [group for group in groups if group is not None]
        ages = [self.step - versions(group)[0] for group in self.handed]
        assert len(self.handed) == len(taken) and all(0 <= age <= self.config.max_staleness for age in ages), f"ages {ages}"
        self.numbers = self._count(self._now)
        self.numbers |= {
            "staleness/mean": sum(ages) / len(ages),
            "staleness/max": float(max(ages)),
            "groups/ahead": float(len(self._places)),
        }
        dropped, self._now = self._now.dropped, _Step()
        self._now.dropped = dropped  # until the end of the step, whose they are
        self._put_off = self._given_up = 0
        self._handed_over = True

    def _drop_stale(self) -> None:
        """Drops what is too old for this step, or was sampled after the checkpoint that the run went back to; its prompt is asked again."""
        with self.journal.transaction():
            for position in list(self._ready):
                place = self._places[position]
                assert place.group is not None
                first, last = versions(place.group)
                if first < self.step - self.config.max_staleness or last > self.version:
                    self._drop(position, place.group, STALE, self._now)
                    self._again(place)

    def _again(self, place: _Place) -> None:
        """The next group at this place is another attempt."""
        slot = place.slot
        if slot.position in self._ready:
            self._ready.remove(slot.position)
        place.slot = Slot(slot.run, slot.position, slot.prompt_id, slot.nth + 1)
        place.begun, place.group, place.version = False, None, self.version

    def end_step(self, taught: Mapping[str, Collection[int]]) -> list[Ended]:
        with self.lock:
            self.dropped = [self._now.dropped[slot] for slot in sorted(self._now.dropped)]
            self._now.dropped = {}
            with self.journal.transaction():
                last = self.step + 1 == self.steps
                ended = super().end_step(taught)
                for group_id in self.journal.unused(self.run) if last else ():
                    # Begun after a checkpoint that the run went back to, at a place where it then began no other.
                    self.journal.use(group_id, self.step - 1, ABORTED)
            # Of what ended here: what was sampled for later steps is counted there.
            self.numbers["tokens/sampled"] = sum(sampled_tokens(c) for end in ended for c in end.group.completions)
            self._handed_over = False
            return ended

    # --- what is made meanwhile ---------------------------------------------------------------------------------------

    def turn(self, timeout_s: float = 0.0) -> bool:
        """Begins what there is room for and takes in what is sampled and scored; whether there was anything. Holds `lock`.

        Waits at most `timeout_s` for something to happen.
        """
        with self.lock:
            if self.failure is not None:
                raise self.failure
            self._fill()
            completions = self.pool.poll(timeout_s) if self.begun else []
            for completion in completions:
                self._arrived(completion)
            judged = self.scorer.poll(0.0 if self.begun else timeout_s)
            for key, scores in judged:
                self._judged(str(key), scores, self._now)
            return bool(completions or judged)

    def _fill(self) -> None:
        if not self._filling:
            return
        for position, prompt in self.prompts.take(max(0, self._room() - len(self._places))):
            self._places[position] = _Place(Slot(self.run, position, prompt.id), prompt, self.version)
        places = [place for place in self._places.values() if not place.begun]
        if not places:
            return
        attempts = self.journal.begin([place.slot for place in places], self.config.group_size, self.version, self.step)
        for place, attempt in zip(places, attempts, strict=True):
            if self.journal.is_used(attempt.group_id):  # when a run ended here that was to be shorter
                self._again(place)
                continue
            place.begun, place.version = True, self.version
            self._ask(_Begun(attempt, place.prompt), self._now)

    def _room(self) -> int:
        """How many groups there may be: not more than the steps take until one that is begun now is too old."""
        first = self.step + int(self._handed_over)
        steps = min(self.version + self.config.max_staleness - first + 1, self.steps - first, 1.0 + self.config.oversample)
        return math.ceil(steps * self._count_wanted)

    def _finished(self, slot: Slot, group: Group, now: _Step) -> None:
        place = self._places[slot.position]
        if has_failed(group):
            self._drop(slot.position, group, FAILED, now)
            place.failures += 1
            self._again(place)
            if place.failures > self.config.max_resamples:
                del self._places[slot.position]
                self._give_up()
        elif self.config.resample_zero_groups and not teaches(group) and self._put_off < self.config.max_resamples * self._count_wanted:
            # Dynamic sampling (arXiv:2503.14476, section 3.2): another prompt takes its place.
            self._drop(slot.position, group, ZERO_ADVANTAGE, now)
            self._put_off += 1
            del self._places[slot.position]
        else:
            place.group, place.version = group, versions(group)[0]
            self._ready.append(slot.position)

    def _check_errors(self, now: _Step) -> None:
        now.expected = max(self._count_wanted * self.config.group_size, len(now.scores))
        super()._check_errors(now)

    def _give_up(self) -> None:
        self._given_up += 1
        if self._given_up >= self._count_wanted:
            raise RunStopped(
                f"step {self.step}: {self._given_up} prompts had no group with two scores, in {self.config.max_resamples + 1} attempts "
                f"each; {self.scorer.explain(self._now.scores)}"
            )

    # --- where others need the engines --------------------------------------------------------------------------------

    @contextmanager
    def standing_still(self, version: int) -> Iterator[None]:
        """Engines are between two tokens within (`rollout.in_flight`), or have finished what they had; then they have `version`."""
        with self.lock:
            with self.pool.paused() if self.config.interrupts else self._drained():
                yield
                self.version, self._filling = version, True

    @contextmanager
    def _drained(self) -> Iterator[None]:
        """Engines have finished what they had, and get nothing new."""
        self.pool.hold()
        try:
            while self.pool.running:
                self.turn(POLL_S)
            yield
        finally:
            self.pool.release()

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """All that was begun is sampled and scored within, and nothing new is begun."""
        with self.lock:
            filling, self._filling = self._filling, False
            while self.begun or self.scoring:
                self.turn(POLL_S)
            try:
                yield
            finally:
                self._filling = filling

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """The position of the prompts, and the places that were begun and not taken."""
        ahead = [[place.slot.position, place.slot.nth, place.failures] for place in self._places.values()]
        return super().state() | {"ahead": ahead, "count": self._count_wanted}

    def restore(self, step: int, state: Mapping[str, Any]) -> None:
        super().restore(step, state)
        self.version = step
        self._filling = not step  # the engines begin with the policy's own weights; those of the checkpoint are the first update
        self._count_wanted = state.get("count", len(state.get("ahead", [])))
        for position, nth, failures in state.get("ahead", []):
            prompt = self.prompts.at(position)
            self._places[position] = _Place(Slot(self.run, position, prompt.id, nth), prompt, step, failures)


def versions(group: Group) -> tuple[int, int]:
    """The oldest and the newest version that wrote a token of the group."""
    each = np.concatenate([c.policy_version[c.mask.astype(bool)] for c in group.completions])
    return int(each.min()), int(each.max())


class Pump:
    """Turns a stream in a thread of its own, as a context manager. What ends it is raised by the stream's next `turn`."""

    def __init__(self, stream: AheadStream):
        self.stream = stream
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stream", daemon=True)

    def __enter__(self) -> "Pump":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        # A lock is not fair: without a pause, however short, whoever waits for it might wait for ever.
        busy = False
        while not self._closing.wait(PAUSE_S / 10 if busy else PAUSE_S):
            with self.stream.lock:
                try:
                    busy = self.stream.turn()
                except BaseException as error:  # noqa: BLE001 -- whatever it is, the learner's thread has to get it
                    self.stream.failure = error
                    return

"""What a run of rl.train has sampled already, as groups for curation: nothing is sampled again.

The run's journal knows every group that was begun, its scores, and its tokens until a checkpoint contained them; after that the text
stands in `completions/`. A group of which neither holds the completions is passed over and counted.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from data.journal import Attempt, Journal
from data.parquet import read_rows
from data.recipe import InputError, read_recipe, resolved_yaml
from data.values import Completion, Score
from rewards.versions import changed_reward, reward_versions
from rl.config import TrainRecipe


@dataclass(frozen=True)
class SampledGroup:
    """A group of a training run: tokens, or texts where the tokens are gone."""

    attempt: Attempt
    completions: tuple[Completion, ...] | None
    texts: tuple[dict[str, Any], ...]
    """Rows of `completions/`, where `completions` is None."""
    scores: tuple[Score, ...] | None


class SampledRun:
    """Iterates over the groups of a run in the order of its prompts; `lost` counts those that nobody holds any more."""

    def __init__(self, folder: Path, since_step: int):
        self.folder = folder
        self.recipe = read_recipe(folder / "recipe.yaml", [], TrainRecipe)
        if self.recipe.rollout.conversation is not None:
            raise InputError(f"experts: {folder} sampled conversations: a record cannot say what a tool wrote; take a run of single turns")
        self.since_step = since_step
        self.lost = 0

    def same_rewards(self, recipe: TrainRecipe) -> bool:
        """Whether the run's scores are what a recipe's rewards would say; the same versions of them, if its journal names any."""
        with Journal(self.folder / "journal.sqlite", read_only=True) as journal:
            unchanged = changed_reward(journal, reward_versions(recipe.rewards)) is None
        return unchanged and resolved_yaml(self.recipe.rewards) == resolved_yaml(recipe.rewards)

    def __iter__(self) -> Iterator[SampledGroup]:
        self.lost = 0
        texts = self._texts()
        with Journal(self.folder / "journal.sqlite", read_only=True) as journal:
            for position in count():
                attempts = journal.attempts_at(self.recipe.run.name, position)
                if not attempts:  # positions are taken one after the other
                    return
                for attempt in attempts:
                    if attempt.step >= self.since_step:
                        yield from self._group(journal, attempt, texts.get(attempt.group_id, []))

    def _group(self, journal: Journal, attempt: Attempt, rows: list[dict[str, Any]]) -> Iterator[SampledGroup]:
        scores = journal.scores(attempt.group_id)
        all_scores = tuple(scores[index] for index in sorted(scores)) if len(scores) == attempt.size else None
        held = journal.completions(attempt.group_id)
        if len(held) == attempt.size:
            yield SampledGroup(attempt, tuple(held[index] for index in sorted(held)), (), all_scores)
        elif len(rows) == attempt.size:
            yield SampledGroup(attempt, None, tuple(sorted(rows, key=lambda row: row["index"])), all_scores)
        else:
            self.lost += 1

    def _texts(self) -> dict[str, list[dict[str, Any]]]:
        """Rows of completions/*.parquet by group."""
        found: dict[str, list[dict[str, Any]]] = {}
        for path in sorted((self.folder / "completions").glob("step-*.parquet")):
            for row in read_rows(path):
                found.setdefault(row["group_id"], []).append(row)
        return found


def as_given(completion: Completion, group_id: str, attempt: int) -> Completion:
    """A completion of another run under a name of ours; its tokens count there."""
    return dataclasses.replace(completion, group_id=group_id, attempt=attempt, mask=np.zeros_like(completion.mask))

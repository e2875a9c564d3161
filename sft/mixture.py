"""The mixture: of the rows that selection and cleaning left, how many of each expert are written (the arithmetic is data/mix.py's).

A source is an expert, or its original responses (`NAME/original`). Which rows are taken and in which order they stand depends on
`run.seed` and the rows alone. Rows that are not taken stand in `rejected.parquet`, with the reason `mix`.
"""

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import numpy as np

from data.cleaning import Rejection
from data.mix import MixSource, Plan, mix_report, mixed, plan_mix
from data.recipe import InputError
from data.rows import SourceRow
from rl.stream import RunStopped
from sft.curate_config import MixConfig

REASON = "mix"


class Mixture:
    """What is taken of `kept`, which gives the rows of records that stay, the same ones each time it is called."""

    def __init__(self, config: MixConfig, seed: int, kept: Callable[[], Iterator[SourceRow]]):
        self.config = config
        self.seed = seed
        self.kept = kept

    @cached_property
    def plans(self) -> list[Plan]:
        """What is taken of each source; RunStopped where one has no rows or too few: all is sampled, so another mix is soon written."""
        shares = self.config.weights or self.config.counts
        sizes: dict[str, list[int]] = {name: [] for name in shares}
        for row in self.kept():
            sizes[row.values["expert"]].append(row.values["tokens"] if self.config.unit == "tokens" else 1)
        try:
            return plan_mix(
                [MixSource(name, share) for name, share in shares.items()],
                [np.array(size, np.int64) for size in sizes.values()],
                counts=bool(self.config.counts), total=self.config.total, repeat=self.config.repeat, seed=self.seed,
            )  # fmt: skip
        except InputError as error:
            raise RunStopped(f"mix: {error}; change `mix` and start again, nothing is sampled anew for it") from None

    def rows(self) -> Iterator[SourceRow]:
        """The mixture, sources in turn by what is left of each."""
        return mixed(self.plans, self.seed, self._of)

    def left_out(self) -> Iterator[Rejection]:
        """The rows that are in no round of their source, in its order."""
        for plan in self.plans:
            taken = _taken(plan)
            detail = f"{int(taken.sum()):,} of {len(taken):,} rows of {plan.source.path} are taken"
            for is_taken, row in zip(taken, self._of(plan.source.path), strict=True):
                if not is_taken:
                    yield Rejection(row, row.values["prompt_id"], REASON, detail)

    @property
    def left_out_count(self) -> int:
        return sum(int((~_taken(plan)).sum()) for plan in self.plans)

    def report(self) -> dict[str, Any]:
        return mix_report(self.plans, self.config.unit, self.seed)

    def _of(self, source: str) -> Iterator[SourceRow]:
        return (row for row in self.kept() if row.values["expert"] == source)


def _taken(plan: Plan) -> np.ndarray:
    """bool [rows]: which rows are in the mixture, once or more often."""
    taken: np.ndarray = np.any(plan.rounds, axis=0)
    return taken

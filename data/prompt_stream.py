"""An endless stream of prompts: each epoch is a shuffle of all of them, and a position says everything about where it stands.

The order of epoch e depends on the seed, e and the number of prompts alone. So a stream can begin at any position, and one that
was resumed gives what one that never stopped would have given.
"""

from collections.abc import Sequence

import numpy as np

from data.values import Prompt


class PromptStream:
    """Prompts handed out so far are positions 0 to `position - 1`; memory is one permutation."""

    def __init__(self, prompts: Sequence[Prompt], seed: int, position: int = 0):
        assert prompts, "a stream needs a prompt"
        self.prompts = prompts
        self.seed = seed
        self.position = position
        """The next place to hand out, counted from the start of the run; the whole state."""
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def take(self, count: int) -> list[tuple[int, Prompt]]:
        """The next prompts, each with its position."""
        places = range(self.position, self.position + count)
        self.position += count
        return [(place, self.at(place)) for place in places]

    def at(self, position: int) -> Prompt:
        """The prompt at a position, handed out or not."""
        epoch, place = divmod(position, len(self.prompts))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(len(self.prompts), self.seed, epoch)
        return self.prompts[self._order[place]]


def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """int64 [count]: the order of one epoch, from a non-negative seed."""
    # numpy promises that raw bits stay the same between its versions; it does not promise that of `shuffle`.
    keys = np.random.PCG64(np.random.SeedSequence((seed, epoch))).random_raw(count)
    return np.argsort(keys, kind="stable")

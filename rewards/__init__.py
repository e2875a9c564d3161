"""Rewards: what judges completions, and says so when it cannot.

A reward function has trl's signature and runs in a worker process; what it says becomes a Score, and what fails there becomes a
failed Score, never a number. `rewards.scorer` runs it, `rewards.config` is the recipe's section, `rewards.registry` the names.
Importing this package loads nothing heavy.
"""

from data.values import Score

__all__ = ["Score"]

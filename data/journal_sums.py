"""What became of every token: the sums of a journal, and the reasons they are kept by."""

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass

TRAINED = "trained"
ZERO_ADVANTAGE = "zero_advantage"
"""All its completions scored alike: nothing to learn from."""
STALE = "stale"
"""Sampled from weights older than `rollout.max_staleness` allows."""
FAILED = "failed"
"""Too few of its completions have an ok score."""
ABORTED = "aborted"
"""Cut off, or come too late, so that no group holds it."""
RESAMPLED = "resampled"
"""Sampled once more for a run that went back behind the checkpoint that had let the arrays go."""


@dataclass(frozen=True)
class Sums:
    """Tokens by what became of them: sampled = trained + wasted + open, always."""

    sampled: int
    trained: int
    wasted: Mapping[str, int]
    """By reason. `failed` also holds completions without an ok score in groups that were trained."""
    open: int
    """In groups without a live use: not used yet, or theirs is void."""
    groups: Mapping[str, int]
    """Groups by the reason of their live use, and `open`."""


def sums(database: sqlite3.Connection) -> Sums:
    """Counts sampled tokens from the completions and used ones from the uses, so that closing is a check and no tautology."""
    wasted: dict[str, int] = {}
    groups: dict[str, int] = {}
    trained = 0
    uses = "SELECT reason, count(*), sum(tokens), sum(trained) FROM use WHERE void IS NULL GROUP BY reason ORDER BY reason"
    for reason, count, tokens, trained_tokens in database.execute(uses):
        groups[reason] = count
        trained += trained_tokens
        lost = FAILED if reason == TRAINED else reason
        wasted[lost] = wasted.get(lost, 0) + tokens - trained_tokens
    for reason, tokens in database.execute("SELECT reason, sum(tokens) FROM waste GROUP BY reason ORDER BY reason"):
        wasted[reason] = wasted.get(reason, 0) + tokens
    unused = "NOT EXISTS (SELECT 1 FROM use WHERE use.attempt = attempt.key AND void IS NULL)"
    groups["open"] = _number(database, f"SELECT count(*) FROM attempt WHERE {unused}")
    left = _number(database, f"SELECT sum(sampled) FROM attempt JOIN completion ON completion.attempt = attempt.key WHERE {unused}")
    sampled = _number(database, "SELECT sum(sampled) FROM completion") + _number(database, "SELECT sum(tokens) FROM waste")
    assert sampled == trained + sum(wasted.values()) + left, f"the account does not close: {sampled=} {trained=} {wasted=} {left=}"
    return Sums(sampled, trained, {reason: tokens for reason, tokens in wasted.items() if tokens}, left, groups)


def _number(database: sqlite3.Connection, query: str) -> int:
    return database.execute(query).fetchone()[0] or 0

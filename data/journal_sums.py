"""What became of every token: the sums of a journal, and the reasons they are kept by."""

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass

TRAINED = "trained"
ZERO_ADVANTAGE = "zero_advantage"
"""All its completions scored alike: nothing to learn from."""
TRUNCATED = "truncated"
"""Cut off at `rollout.max_tokens`, and `loss.mask_truncated` keeps that from training; of a group: what differed was cut off."""
STALE = "stale"
"""Sampled from weights older than `rollout.max_staleness` allows."""
FAILED = "failed"
"""Too few of its completions have an ok score."""
ABORTED = "aborted"
"""Cut off, or come too late, so that no group holds it."""
RESAMPLED = "resampled"
"""Sampled once more for a run that went back behind the checkpoint that had let the arrays go."""
OPEN = "open"
"""Not used yet, or its use is void."""


@dataclass(frozen=True)
class Sums:
    """Tokens by what became of them: sampled = trained + wasted + open, always."""

    sampled: int
    trained: int
    wasted: Mapping[str, int]
    """By reason. `failed` and `truncated` also hold such completions of groups that were trained."""
    open: int
    """In groups without a live use: not used yet, or theirs is void."""
    groups: Mapping[str, int]
    """Groups by the reason of their live use, and `open`."""


def sums(database: sqlite3.Connection) -> Sums:
    """Counts sampled tokens from the completions and used ones from the uses, so that closing is a check and no tautology.

    Reads the whole journal.
    """
    wasted: dict[str, int] = {}
    groups: dict[str, int] = {}
    trained = 0

    def waste(reason: str, tokens: int) -> None:
        wasted[reason] = wasted.get(reason, 0) + tokens

    uses = "SELECT reason, count(*), sum(tokens), sum(trained), sum(masked) FROM use WHERE void IS NULL GROUP BY reason ORDER BY reason"
    for reason, count, tokens, trained_tokens, masked in database.execute(uses):
        groups[reason] = count
        trained += trained_tokens
        waste(TRUNCATED, masked)
        waste(FAILED if reason == TRAINED else reason, tokens - trained_tokens - masked)
    for reason, tokens in database.execute("SELECT reason, sum(tokens) FROM waste GROUP BY reason ORDER BY reason"):
        waste(reason, tokens)
    unused = "NOT EXISTS (SELECT 1 FROM use WHERE use.attempt = attempt.key AND void IS NULL)"
    groups[OPEN] = _number(database, f"SELECT count(*) FROM attempt WHERE {unused}")
    left = _number(database, f"SELECT sum(sampled) FROM attempt JOIN completion ON completion.attempt = attempt.key WHERE {unused}")
    sampled = _number(database, "SELECT sum(sampled) FROM completion") + _number(database, "SELECT sum(tokens) FROM waste")
    assert sampled == trained + sum(wasted.values()) + left, f"the account does not close: {sampled=} {trained=} {wasted=} {left=}"
    begun = _number(database, "SELECT count(*) FROM attempt")
    assert begun == sum(groups.values()), f"the account does not close: {begun} groups begun, {groups}"
    return Sums(sampled, trained, {reason: tokens for reason, tokens in sorted(wasted.items()) if tokens}, left, groups)


def check_uses(database: sqlite3.Connection, begin: int, end: int) -> None:
    """Asserts that live uses in steps `begin` to `end - 1` account for every token of their groups; reads these groups alone.

    What a checkpoint contains does not change any more, so that checking each step once keeps the sums of the whole run closed.
    """
    query = """SELECT attempt, tokens, trained, masked,
                      (SELECT coalesce(sum(sampled), 0) FROM completion WHERE completion.attempt = use.attempt) AS held
               FROM use WHERE step >= ? AND step < ? AND void IS NULL
               AND NOT (tokens = held AND trained >= 0 AND masked >= 0 AND trained + masked <= tokens)"""
    wrong = database.execute(query, (begin, end)).fetchone()
    assert wrong is None, "the account does not close: group {}: {} tokens used, {} trained, {} masked, {} sampled".format(*wrong or ())


def _number(database: sqlite3.Connection, query: str) -> int:
    return database.execute(query).fetchone()[0] or 0

"""What people ask a journal: where the tokens went, what was done in vain, and how often each prompt was answered right, over time."""

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass

from data.journal_sums import Sums, sums


@dataclass(frozen=True)
class Judged:
    """One group of a prompt that has scores."""

    prompt_id: str
    step: int
    """In which it was used; begun, where it is open."""
    outcome: str | None
    """The reason of its live use; None is open."""
    judged: int
    """Completions with a verdict."""
    right: int
    """Those of them that are right: a verdict of 1 or more."""
    reward: float | None
    """Mean value of its scores; None where none has one."""


@dataclass(frozen=True)
class Account:
    """A journal at one moment."""

    sums: Sums
    steps: int
    """Steps that have live uses."""
    contained: int
    """Steps that a checkpoint contains."""
    provisional: int
    """Live uses that no checkpoint contains yet."""
    void: Mapping[str, tuple[int, int]]
    """By reason: uses that a run went back behind, and their tokens; the groups were used again, or are open."""
    prompts: Mapping[str, list[Judged]]
    """Scored groups of each prompt, in the order in which they were begun."""


def account(database: sqlite3.Connection, part: str | None) -> Account:
    """Reads all of a journal; `part` gives the verdicts, by its own value before weights and gates, None: the combined value does."""
    void = "SELECT reason, count(*), sum(tokens) FROM use WHERE void IS NOT NULL GROUP BY reason ORDER BY reason"
    contained = database.execute("SELECT value FROM meta WHERE key = 'contained'").fetchone()
    steps, provisional = database.execute(
        "SELECT coalesce(max(step) + 1, 0), count(*) FILTER (WHERE checkpoint IS NULL) FROM use WHERE void IS NULL"
    ).fetchone()
    verdict = "value" if part is None else "CASE WHEN json_valid(parts) THEN json_extract(parts, :place) END"
    query = f"""
        SELECT prompt_id, coalesce(use.step, attempt.step), reason, count(verdict), count(*) FILTER (WHERE verdict >= 1), avg(value)
        FROM attempt JOIN (SELECT attempt, value, {verdict} AS verdict FROM score) AS scored ON scored.attempt = attempt.key
        LEFT JOIN use ON use.attempt = attempt.key AND void IS NULL
        GROUP BY attempt.key ORDER BY attempt.key"""
    prompts: dict[str, list[Judged]] = {}
    for row in database.execute(query, {"place": f"$.{json.dumps(part)}"}):
        prompts.setdefault(row[0], []).append(Judged(*row))
    return Account(
        sums(database), steps, json.loads(contained[0]) if contained else 0, provisional,
        {reason: (uses, tokens) for reason, uses, tokens in database.execute(void)}, prompts,
    )  # fmt: skip

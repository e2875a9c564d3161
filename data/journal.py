"""The journal of a run: what was asked, sampled, scored and used, each exactly once, whatever gets killed in between.

    slot -> attempt -> completions -> scores -> use: trained in step N, or dropped with a reason -> the checkpoint that contains it

A *slot* is a place where a group is wanted: `position` in the prompt stream, `nth` try there. Beginning a slot that was begun
before gives the same attempt again. So a resumed run has no path of its own: it begins its slots as it did the first time, finds
the completions and scores that are held, and makes what is missing. Every write is one transaction, and writing something twice
changes nothing.

A use is provisional until a checkpoint contains it. `resume(s)` goes back to the checkpoint of step s, which contains steps 0 to
s-1: later uses become void (and stay in the account as such), and their groups can be used again. Arrays are kept until they can
no longer be asked for; what remains for good is some hundred bytes a completion.

Not only the trainer stands on it: a scorer's slots are rows of its file, and curation's are the prompts of an expert.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from data.array_blob import pack, unpack
from data.journal_account import Account, account
from data.journal_file import lock_for_writing, open_database
from data.journal_sums import ABORTED, FAILED, RESAMPLED, TRAINED, Sums, check_uses, sums
from data.recipe import InputError
from data.values import Completion, Score, group_id


@dataclass(frozen=True)
class Slot:
    """A place where a group is wanted; the key under which its attempt is found again."""

    run: str
    """Who samples: the run's name, or an expert's; the first part of the group's id."""
    position: int
    """Place in the prompt stream, or row of a file."""
    prompt_id: str
    nth: int = 0
    """Counts the groups begun at this position, from 0; above 0 where one before it failed or taught nothing."""


@dataclass(frozen=True)
class Attempt:
    """A group begun."""

    key: int
    """Row in the journal."""
    group_id: str
    slot: Slot
    attempt: int
    """Counts the groups begun for this prompt in this run, over all positions."""
    size: int
    """Completions wanted."""
    version: int
    """Policy version when it was first begun."""
    step: int
    """Step in which it was first begun."""


@dataclass(frozen=True)
class Use:
    """What became of a group."""

    step: int
    reason: str
    """`trained`, or why it was dropped."""
    tokens: int
    trained: int
    masked: int
    checkpoint: int | None
    """First step whose checkpoint contains it; None is provisional."""
    void: int | None
    """The step that a run resumed from before this use; None is live."""


class Journal:
    """A context manager; one writer, used by one thread at a time. With `read_only` it reads beside the writer, or after its death."""

    def __init__(self, path: str | Path, read_only: bool = False):
        """Opens or makes the journal; InputError if it is damaged, foreign, missing (read_only) or another process writes it."""
        self.path = Path(path)
        self._begin_transaction = "BEGIN" if read_only else "BEGIN IMMEDIATE"
        with ExitStack() as opened:
            if not read_only:
                opened.enter_context(lock_for_writing(self.path))
            self._db = opened.enter_context(closing(open_database(self.path, read_only)))
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._opened.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Joins the calls within into one transaction; each call is one of its own otherwise."""
        if self._db.in_transaction:
            yield
            return
        with self._db:
            self._db.execute(self._begin_transaction)
            yield

    def flush(self) -> None:
        """Makes all that was committed survive a loss of power; to be called before a checkpoint is renamed into place."""
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    # --- What a run is ------------------------------------------------------------------------------------------------

    def meta(self, key: str) -> Any:
        """A JSON value by key, None if it was never set."""
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def set_meta(self, **values: Any) -> None:
        with self.transaction():
            self._db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", [(k, json.dumps(v)) for k, v in values.items()])

    # --- Groups, completions, scores ----------------------------------------------------------------------------------

    def begin(self, slots: Sequence[Slot], size: int, version: int = 0, step: int = 0) -> list[Attempt]:
        """The attempts of these slots, each begun now unless it was before (it then keeps its first version and step).

        InputError if a position was given to another prompt: the prompts changed since.
        """
        with self.transaction():
            return [self._attempt_at(slot) or self._begin(slot, size, version, step) for slot in slots]

    def _attempt_at(self, slot: Slot) -> Attempt | None:
        found = self._attempts("run = ? AND position = ? AND nth = ?", (slot.run, slot.position, slot.nth))
        if found and found[0].slot.prompt_id != slot.prompt_id:
            raise InputError(
                f"{self.path}: position {slot.position} was given to prompt '{found[0].slot.prompt_id}', and now to "
                f"'{slot.prompt_id}': the prompts have changed since; restore them, or choose another run.name"
            )
        return found[0] if found else None

    def _begin(self, slot: Slot, size: int, version: int, step: int) -> Attempt:
        last = "SELECT max(attempt) FROM attempt WHERE run = ? AND prompt_id = ?"
        number = self._db.execute(last, (slot.run, slot.prompt_id)).fetchone()[0]
        number = 0 if number is None else number + 1
        name = group_id(slot.run, slot.prompt_id, number)
        row = (name, slot.run, slot.position, slot.nth, slot.prompt_id, number, size, version, step)
        key = self._db.execute("INSERT INTO attempt VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row).lastrowid
        assert key is not None
        return Attempt(key, name, slot, number, size, version, step)

    def put_completions(self, completions: Sequence[Completion]) -> None:
        """Keeps finished completions, of one group or several; the first one of each index counts.

        One with finish_reason `abort` is not kept: its tokens count as wasted (`failed` if its conversation failed) and its index stays
        to be asked again. So do tokens that come after their group was dropped.
        """
        groups: dict[str, list[Completion]] = {}
        for completion in completions:
            groups.setdefault(completion.group_id, []).append(completion)
        with self.transaction():
            for group, members in groups.items():
                self._put(self._key(group), members)

    def _put(self, key: int, completions: Sequence[Completion]) -> None:
        """Completions of one group."""
        rows = self._db.execute("SELECT idx, sampled, engine FROM completion WHERE attempt = ?", (key,))
        held = {index: (sampled, engine) for index, sampled, engine in rows}
        live = self._db.execute("SELECT reason FROM use WHERE attempt = ? AND void IS NULL", (key,)).fetchone()
        for completion in completions:
            place = (key, completion.index)
            sampled = int(completion.mask.sum())
            if completion.finish_reason == "abort":
                self._waste(place, sampled, FAILED if completion.failed else ABORTED, completion.engine)
                continue
            if completion.index not in held and live is not None:
                self._waste(place, sampled, ABORTED if live[0] == TRAINED else live[0], completion.engine)
                continue
            if completion.index in held:
                if live is not None or self._holds_arrays(place):
                    continue
                # Its arrays were dropped, and then its use became void: it was sampled again, and a score of the old one says nothing.
                before, engine = held[completion.index]
                self._waste(place, before, RESAMPLED, engine)
                self._db.execute("DELETE FROM score WHERE attempt = ? AND idx = ?", place)
            self._keep(place, sampled, completion)
            held[completion.index] = (sampled, completion.engine)

    def _keep(self, place: tuple[int, int], sampled: int, completion: Completion) -> None:
        versions = completion.policy_version
        span = (int(versions.min()), int(versions.max())) if versions.size else (None, None)
        ending = (completion.finish_reason, completion.engine)
        row = (*place, completion.seed, len(completion.token_ids), sampled, *ending, *span)
        self._db.execute("INSERT OR REPLACE INTO completion VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
        self._db.execute("INSERT INTO arrays VALUES (?, ?, ?)", (*place, pack(_arrays(completion))))

    def _holds_arrays(self, place: tuple[int, int]) -> bool:
        return self._db.execute("SELECT 1 FROM arrays WHERE attempt = ? AND idx = ?", place).fetchone() is not None

    def _waste(self, place: tuple[int, int], tokens: int, reason: str, engine: str) -> None:
        self._db.execute("INSERT INTO waste VALUES (?, ?, ?, ?, ?)", (*place, tokens, reason, engine))

    def completions(self, group: str) -> dict[int, Completion]:
        """The completions of a group that are held whole, by index, exactly as they were put."""
        attempt = self.attempt(group)
        query = """SELECT idx, seed, finish_reason, engine, data FROM completion JOIN arrays USING (attempt, idx)
                   WHERE attempt = ? ORDER BY idx"""
        return {
            index: Completion(
                prompt_id=attempt.slot.prompt_id, group_id=group, index=index, attempt=attempt.attempt, seed=seed,
                finish_reason=finish_reason, engine=engine, **unpack(data),  # type: ignore[arg-type]
            )
            for index, seed, finish_reason, engine, data in self._db.execute(query, (attempt.key,))
        }  # fmt: skip

    def put_scores(self, group: str, scores: Mapping[int, Score], logged: Sequence[tuple[str, float]] = ()) -> None:
        """Keeps scores by index; the first one of each index counts. `logged`: what reward functions logged of the group."""
        key = self._key(group)
        rows = [(key, i, s.value, s.status, json.dumps(dict(s.parts)), s.detail) for i, s in scores.items()]
        with self.transaction():
            self._db.executemany("INSERT INTO score VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (attempt, idx) DO NOTHING", rows)
            if logged:
                self._db.execute("INSERT OR REPLACE INTO logged VALUES (?, ?)", (key, json.dumps(logged)))

    def scores(self, group: str) -> dict[int, Score]:
        query = "SELECT idx, value, status, parts, detail FROM score WHERE attempt = ? ORDER BY idx"
        rows = self._db.execute(query, (self._key(group),))
        return {index: Score(value, status, json.loads(parts), detail) for index, value, status, parts, detail in rows}

    def logged(self, group: str) -> list[tuple[str, float]]:
        """What reward functions logged of a group when it was scored."""
        row = self._db.execute("SELECT data FROM logged WHERE attempt = ?", (self._key(group),)).fetchone()
        return [] if row is None else [(name, value) for name, value in json.loads(row[0])]

    # --- Uses and checkpoints -----------------------------------------------------------------------------------------

    def unused(self, run: str) -> list[str]:
        """Groups of a run that were begun and have no live use."""
        live = "SELECT 1 FROM use WHERE use.attempt = attempt.key AND void IS NULL"
        return [row[0] for row in self._db.execute(f"SELECT group_id FROM attempt WHERE run = ? AND NOT EXISTS ({live})", (run,))]

    def is_used(self, group: str) -> bool:
        """Whether a group has a live use."""
        query = "SELECT 1 FROM use WHERE attempt = ? AND void IS NULL"
        return self._db.execute(query, (self._key(group),)).fetchone() is not None

    def use(self, group: str, step: int, reason: str, taught: Collection[int] | None = None) -> None:
        """Ends a group: trained in this step, or dropped in it for a reason. The same again changes nothing.

        taught: indices of the completions that were trained on; None is all that have an ok score.
        """
        key = self._key(group)
        with self.transaction():
            live = self._db.execute("SELECT step, reason FROM use WHERE attempt = ? AND void IS NULL", (key,)).fetchone()
            if live is not None:
                assert live == (step, reason), f"group {group} was {live[1]} in step {live[0]}, and is now {reason} in step {step}"
                return
            query = "SELECT idx, sampled, status = 'ok' FROM completion LEFT JOIN score USING (attempt, idx) WHERE attempt = ?"
            rows = self._db.execute(query, (key,)).fetchall()
            tokens = sum(sampled for _, sampled, _ in rows)
            ok = {index: sampled for index, sampled, is_ok in rows if is_ok and reason == TRAINED}
            trained = sum(sampled for index, sampled in ok.items() if taught is None or index in taught)
            row = (key, step, reason, tokens, trained, sum(ok.values()) - trained)
            self._db.execute("INSERT INTO use VALUES (NULL, ?, ?, ?, ?, ?, ?, NULL, NULL)", row)

    def contain(self, step: int, oldest: int) -> None:
        """A checkpoint of `step` is in place: it contains the uses of steps before.

        Asserts that the uses it contains account for every token of their groups. Arrays used in steps before `oldest`, the step of
        the oldest checkpoint that is still there, can no longer be asked for and are dropped.
        """
        with self.transaction():
            check_uses(self._db, self.meta("contained") or 0, step)
            self._contain(step)
            for table in ("arrays", "logged"):
                self._db.execute(
                    f"""DELETE FROM {table} WHERE EXISTS
                        (SELECT 1 FROM use WHERE use.attempt = {table}.attempt AND void IS NULL AND step < ?)""",
                    (min(step, oldest),),
                )
        self.flush()

    def _contain(self, step: int) -> None:
        # The range of steps keeps this from reading the uses of the whole run: those before the last checkpoint are marked.
        last = self.meta("contained") or 0
        mark = "UPDATE use SET checkpoint = ? WHERE step >= ? AND step < ? AND checkpoint IS NULL AND void IS NULL"
        self._db.execute(mark, (step, last, step))
        self.set_meta(contained=step)

    def resume(self, step: int) -> int:
        """The run goes on from the checkpoint of `step` (0: from the start): later uses become void. Returns how many.

        Also marks what that checkpoint contains, in case the run was killed between the checkpoint and `contain`. Scores of a group
        that can be used again are forgotten if one of them failed: what made it fail may have been mended since.
        """
        with self.transaction():
            voided = self._db.execute("UPDATE use SET void = ? WHERE step >= ? AND void IS NULL", (step, step)).rowcount
            self._contain(step)
            self._db.execute(
                """DELETE FROM score WHERE attempt IN (SELECT attempt FROM score WHERE status IN ('timeout', 'error'))
                   AND NOT EXISTS (SELECT 1 FROM use WHERE use.attempt = score.attempt AND void IS NULL)"""
            )
            self._db.execute("DELETE FROM logged WHERE NOT EXISTS (SELECT 1 FROM score WHERE score.attempt = logged.attempt)")
        return voided

    # --- The account --------------------------------------------------------------------------------------------------

    def attempt(self, group: str) -> Attempt:
        found = self._attempts("group_id = ?", (group,))
        assert found, f"group {group} was never begun"
        return found[0]

    def attempts_at(self, run: str, position: int) -> list[Attempt]:
        """All attempts begun at a position, in order of `nth`."""
        return self._attempts("run = ? AND position = ? ORDER BY nth", (run, position))

    def _attempts(self, condition: str, values: tuple[Any, ...]) -> list[Attempt]:
        query = f"SELECT key, group_id, run, position, prompt_id, nth, attempt, size, version, step FROM attempt WHERE {condition}"
        return [Attempt(row[0], row[1], Slot(*row[2:6]), *row[6:]) for row in self._db.execute(query, values)]

    def _key(self, group: str) -> int:
        row = self._db.execute("SELECT key FROM attempt WHERE group_id = ?", (group,)).fetchone()
        assert row is not None, f"group {group} was never begun"
        return row[0]

    def uses(self, group: str) -> list[Use]:
        """All uses of a group in the order they happened, void ones included; the last may be live."""
        query = "SELECT step, reason, tokens, trained, masked, checkpoint, void FROM use WHERE attempt = ? ORDER BY key"
        return [Use(*row) for row in self._db.execute(query, (self._key(group),))]

    def sums(self) -> Sums:
        """What became of every token sampled, and every group begun, so far. Asserts that the sums close."""
        with self.transaction():
            return sums(self._db)

    def account(self, part: str | None = None) -> Account:
        """The sums and more, for people; `part` is the part of a score that says what is right, None: its value does."""
        with self.transaction():
            return account(self._db, part)


def _arrays(completion: Completion) -> dict[str, np.ndarray]:
    arrays = {
        "token_ids": completion.token_ids,
        "mask": completion.mask,
        "engine_logp": completion.engine_logp,
        "policy_version": completion.policy_version,
        "routes": completion.routes,
        "routes_valid": completion.routes_valid,
    }
    return {name: array for name, array in arrays.items() if array is not None}

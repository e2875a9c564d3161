"""The file under the journal: one SQLite database in WAL mode, one writer at a time, any number of readers beside it.

WAL without a sync at every commit survives kill -9 of this process at any moment: what was committed is there, what was not is
gone. A loss of power may take the last transactions with it, so `Journal.flush` syncs before a checkpoint counts on them.
"""

import fcntl
import os
import socket
import sqlite3
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from data.recipe import InputError


class InUse(InputError):
    """Another process writes this journal; the run is that process's, and nothing of it may be touched."""


APPLICATION_ID = int.from_bytes(b"Coho", "big")
FORMAT = 2
"""Raised with every change of SCHEMA; another format is refused."""

SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;

-- One group begun. A slot (run, position, nth) asks for it; (run, prompt_id, attempt) names it.
CREATE TABLE attempt (
    key INTEGER PRIMARY KEY, group_id TEXT NOT NULL UNIQUE,
    run TEXT NOT NULL, position INTEGER NOT NULL, nth INTEGER NOT NULL,
    prompt_id TEXT NOT NULL, attempt INTEGER NOT NULL,
    size INTEGER NOT NULL, version INTEGER NOT NULL, step INTEGER NOT NULL,
    UNIQUE (run, position, nth), UNIQUE (run, prompt_id, attempt));

-- What stays of a completion for good: `tokens` it has, `sampled` of them written by the policy.
CREATE TABLE completion (
    attempt INTEGER NOT NULL, idx INTEGER NOT NULL,
    seed INTEGER NOT NULL, tokens INTEGER NOT NULL, sampled INTEGER NOT NULL, finish_reason TEXT NOT NULL, engine TEXT NOT NULL,
    version_min INTEGER, version_max INTEGER,
    PRIMARY KEY (attempt, idx)) WITHOUT ROWID;

-- Its arrays, until a checkpoint contains the step that used them.
CREATE TABLE arrays (attempt INTEGER NOT NULL, idx INTEGER NOT NULL, data BLOB NOT NULL, PRIMARY KEY (attempt, idx));

CREATE TABLE score (
    attempt INTEGER NOT NULL, idx INTEGER NOT NULL,
    value REAL, status TEXT NOT NULL, parts TEXT NOT NULL, detail TEXT NOT NULL,
    PRIMARY KEY (attempt, idx), CHECK ((value IS NOT NULL) = (status = 'ok'))) WITHOUT ROWID;

-- What reward functions logged of a group by `log_metric`, as JSON, as long as its arrays.
CREATE TABLE logged (attempt INTEGER PRIMARY KEY, data TEXT NOT NULL);

-- The end of a group: `tokens` sampled in it, `trained` of them, `masked` in completions that have a score and were kept from training.
-- `checkpoint` is the first step whose checkpoint contains it (null: provisional); `void` is the step that a run resumed from before
-- it (null: live). A group has one live use at most.
CREATE TABLE use (
    key INTEGER PRIMARY KEY, attempt INTEGER NOT NULL, step INTEGER NOT NULL, reason TEXT NOT NULL,
    tokens INTEGER NOT NULL, trained INTEGER NOT NULL, masked INTEGER NOT NULL, checkpoint INTEGER, void INTEGER);
CREATE UNIQUE INDEX live_use ON use (attempt) WHERE void IS NULL;
CREATE INDEX use_of_attempt ON use (attempt);
CREATE INDEX use_of_step ON use (step);

-- Tokens sampled that no completion holds.
CREATE TABLE waste (
    attempt INTEGER NOT NULL, idx INTEGER NOT NULL, tokens INTEGER NOT NULL, reason TEXT NOT NULL, engine TEXT NOT NULL);
"""


def open_database(path: Path, read_only: bool) -> sqlite3.Connection:
    """Opens or makes a journal's database; InputError for a file that is missing (to a reader), damaged, or something else."""
    if read_only and not path.is_file():
        raise InputError(f"{path}: no journal here; name the folder of a run that has begun")
    uri = f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}"
    with ExitStack() as on_error:
        try:
            # One thread at a time, which is for its user to see to (`GroupStream.lock`).
            database = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
            on_error.callback(database.close)
            _check(database, path, read_only)
        except sqlite3.DatabaseError as error:
            raise InputError(f"{path}: not readable as a journal ({error}); move it away to start anew, or restore a copy") from None
        on_error.pop_all()
    return database


def _check(database: sqlite3.Connection, path: Path, read_only: bool) -> None:
    is_new = database.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0] == 0
    if is_new and not read_only:
        _create(database)
    if database.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise InputError(f"{path}: an SQLite file, but no journal of Cohort; move it away, or choose another run.name")
    found = database.execute("PRAGMA user_version").fetchone()[0]
    if found != FORMAT:
        raise InputError(f"{path}: a journal of format {found}, and this version reads {FORMAT}; use the version that wrote it")
    verdict = database.execute("PRAGMA quick_check(1)").fetchone()[0]
    if verdict != "ok":
        raise InputError(f"{path}: a damaged journal ({' '.join(verdict.split())}); move it away to start anew, or restore a copy")
    if not read_only:
        database.execute("PRAGMA synchronous = NORMAL")
        # 64 MiB of log before it is copied into the file: with the default, 4 MiB, a step of long completions syncs dozens of times
        database.execute("PRAGMA wal_autocheckpoint = 16384")
        database.execute("PRAGMA secure_delete = OFF")


def _create(database: sqlite3.Connection) -> None:
    database.execute("PRAGMA journal_mode = WAL")
    database.executescript(f"BEGIN; {SCHEMA} PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {FORMAT}; COMMIT;")


def lock_for_writing(path: Path) -> IO[str]:
    """Holds `<path>.lock` until the returned file is closed or this process ends, however it ends.

    InUse if another process holds it. A record lock: a child made by fork would inherit an flock and outlive us with it.
    """
    lock = open(path.with_name(path.name + ".lock"), "a+", encoding="utf-8")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        lock.close()
        raise InUse(f"{path}: in use by {holder}; wait for it or stop it, or choose another run.name") from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()
    return lock

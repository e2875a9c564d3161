"""The journal: what is put comes back byte for byte, twice is once, a kill loses nothing, and the sums always close."""

import itertools
import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from data.array_blob import pack, unpack
from data.journal import Journal, Slot
from data.journal_sums import FAILED, STALE, TRAINED, TRUNCATED, ZERO_ADVANTAGE
from data.recipe import InputError
from data.values import Completion, Score, completion_seed

OK = Score(1.0, parts={"math_answer": 1.0, "brevity": None})
HERE = Path(__file__).resolve().parents[2]


def completion(journal: Journal, group: str, index: int, tokens: int = 4, **values) -> Completion:
    """A completion whose every array follows from its seed."""
    attempt = journal.attempt(group)
    seed = completion_seed(0, attempt.slot.prompt_id, attempt.attempt, index)
    rng = np.random.default_rng(seed)
    defaults = {
        "token_ids": rng.integers(0, 1000, tokens).astype(np.int32),
        "mask": np.ones(tokens, np.uint8),
        "engine_logp": rng.normal(size=tokens).astype(np.float32),
        "policy_version": np.full(tokens, attempt.version, np.int32),
        "finish_reason": "stop",
        "engine": "hf-0",
    }
    return Completion(attempt.slot.prompt_id, group, index, attempt.attempt, seed, **(defaults | values))


def same_bytes(a: Completion, b: Completion) -> bool:
    for field in fields(Completion):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, np.ndarray):
            if not isinstance(y, np.ndarray) or (x.dtype, x.shape, x.tobytes()) != (y.dtype, y.shape, y.tobytes()):
                return False
        elif x != y:
            return False
    return True


@pytest.fixture
def journal(tmp_path) -> Iterator[Journal]:
    with Journal(tmp_path / "journal.sqlite") as journal:
        yield journal


def begin(journal: Journal, position: int = 0, prompt_id: str = "p", nth: int = 0, step: int = 0) -> str:
    return journal.begin([Slot("run", position, prompt_id, nth)], 2, step, step)[0].group_id


def sampled_group(journal: Journal, position: int = 0, prompt_id: str = "p", scores=(OK, OK)) -> str:
    group = begin(journal, position, prompt_id)
    journal.put_completions([completion(journal, group, index) for index in range(2)])
    journal.put_scores(group, dict(enumerate(scores)))
    return group


# --- What is put comes back -------------------------------------------------------------------------------------------


def test_completions_come_back_byte_for_byte(journal):
    group = begin(journal)
    odd = np.array([np.nan, -0.0, 0.0, np.inf], np.float32)
    put = [
        completion(journal, group, 0, engine_logp=odd, policy_version=np.array([1, 1, 2, 2], np.int32), finish_reason="length"),
        completion(
            journal, group, 1, mask=np.array([1, 0, 0, 1], np.uint8), routes=np.arange(7 * 2 * 3).reshape(7, 2, 3).astype(np.uint8),
            routes_valid=np.array([1, 1, 1, 1, 1, 1, 0], bool),
        ),
        completion(journal, group, 2, tokens=0),
        completion(journal, group, 3, tokens=1),
    ]  # fmt: skip
    journal.put_completions(put)
    held = journal.completions(group)
    assert list(held) == [0, 1, 2, 3]
    assert all(same_bytes(put[index], held[index]) for index in held)
    held[0].token_ids[0] = 7  # torch takes no read-only arrays without a warning


def test_equal_elements_are_written_once_and_no_others():
    ones, zeros = np.ones(1000, np.uint8), np.zeros(1000, np.float32)
    assert len(pack({"mask": ones})) < 50
    zeros[1] = -0.0
    blob = pack({"a": zeros, "b": ones.reshape(10, 100)})
    assert len(blob) > 4000
    assert unpack(blob)["a"].tobytes() == zeros.tobytes() and unpack(blob)["b"].shape == (10, 100)


def test_scores_come_back_and_a_failure_keeps_what_it_said(journal):
    group = begin(journal)
    scores = {
        0: Score(0.1 + 0.2, parts={"a": 1.0, "b": None}),
        1: Score(None, "timeout", {"a": None}, "5 s \u2026"),
        2: Score(None, "unscored"),
    }
    journal.put_scores(group, scores)
    assert journal.scores(group) == scores


def test_a_score_that_is_no_number_is_refused(journal):
    group = begin(journal)
    with pytest.raises(sqlite3.IntegrityError):
        journal.put_scores(group, {0: OK, 1: Score(float("nan"))})
    assert journal.scores(group) == {}


def test_meta_values_last(journal, tmp_path):
    journal.set_meta(seed=3, recipe="ab12")
    journal.set_meta(seed=4)
    journal.close()
    with Journal(tmp_path / "journal.sqlite") as again:
        assert (again.meta("seed"), again.meta("recipe"), again.meta("never")) == (4, "ab12", None)


# --- Twice is once ----------------------------------------------------------------------------------------------------


def test_a_slot_begun_again_is_the_same_attempt(journal):
    slots = [Slot("run", 0, "p"), Slot("run", 1, "q"), Slot("run", 2, "p"), Slot("run", 0, "p", nth=1)]
    first = journal.begin(slots, size=8, version=3, step=3)
    assert [attempt.group_id for attempt in first] == ["run/p/0", "run/q/0", "run/p/1", "run/p/2"]
    assert journal.begin(slots, size=8, version=5, step=5) == first
    assert journal.attempts_at("run", 0) == [first[0], first[3]]
    assert journal.begin([Slot("expert", 0, "p")], size=8)[0].group_id == "expert/p/0"


def test_a_position_belongs_to_its_prompt(journal):
    begin(journal, 17, "a")
    with pytest.raises(InputError, match="position 17 was given to prompt 'a', and now to 'b': the prompts have changed since"):
        begin(journal, 17, "b")


def test_what_was_put_first_stays(journal):
    group = sampled_group(journal)
    before, sums = journal.completions(group), journal.sums()
    journal.put_completions([completion(journal, group, 0, tokens=9)])
    journal.put_scores(group, {0: Score(0.0)})
    assert same_bytes(journal.completions(group)[0], before[0])
    assert journal.scores(group)[0] == OK
    journal.use(group, 0, TRAINED)
    journal.use(group, 0, TRAINED)
    journal.put_completions([completion(journal, group, 0)])
    assert journal.sums().sampled == sums.sampled == journal.sums().trained == 8
    assert len(journal.uses(group)) == 1


def test_a_group_is_used_once(journal):
    group = sampled_group(journal)
    journal.use(group, 0, TRAINED)
    with pytest.raises(AssertionError, match="was trained in step 0, and is now stale in step 1"):
        journal.use(group, 1, STALE)


# --- Where tokens go --------------------------------------------------------------------------------------------------


def test_sums_by_hand(journal):
    trained = sampled_group(journal, 0, "a", (OK, Score(None, "error")))
    zero = sampled_group(journal, 1, "b")
    failed = sampled_group(journal, 2, "c", (Score(None, "error"), Score(None, "timeout")))
    sampled_group(journal, 3, "d")
    late = begin(journal, 4, "e")
    journal.put_completions([completion(journal, late, 0, tokens=10, mask=np.array([1] * 7 + [0] * 3, np.uint8))])
    journal.put_completions([completion(journal, late, 1, tokens=5, finish_reason="abort")])
    for group, reason in ((trained, TRAINED), (zero, ZERO_ADVANTAGE), (failed, FAILED), (late, STALE)):
        journal.use(group, 0, reason)
    journal.put_completions([completion(journal, late, 1, tokens=6)])
    sums = journal.sums()
    assert sums.sampled == 4 * 8 + 7 + 5 + 6
    assert sums.trained == 4
    assert sums.wasted == {"zero_advantage": 8, "failed": 4 + 8, "stale": 7 + 6, "aborted": 5}
    assert sums.open == 8
    assert sums.groups == {"trained": 1, "zero_advantage": 1, "failed": 1, "stale": 1, "open": 1}
    assert list(journal.completions(late)) == [0]


def test_what_has_a_score_and_was_kept_from_training_is_truncated(journal):
    masked = sampled_group(journal, 0, "a", (OK, OK))
    unscored = sampled_group(journal, 1, "b", (OK, Score(None, "unscored")))
    whole = sampled_group(journal, 2, "c")
    journal.use(masked, 0, TRAINED, taught=[1])
    journal.use(unscored, 0, TRAINED, taught=[0])
    journal.use(whole, 0, TRUNCATED)
    sums = journal.sums()
    assert (sums.trained, sums.wasted) == (8, {"failed": 4, "truncated": 4 + 8})
    assert [(use.tokens, use.trained, use.masked) for group in (masked, unscored, whole) for use in journal.uses(group)] == [
        (8, 4, 4), (8, 4, 0), (8, 0, 0)
    ]  # fmt: skip


# --- Checkpoints and going back ---------------------------------------------------------------------------------------


def test_what_functions_logged_of_a_group_is_resumed_with_its_scores(journal):
    kept, failed = begin(journal, 0, "a"), begin(journal, 1, "b")
    for group, score in ((kept, OK), (failed, Score(None, "error"))):
        journal.put_completions([completion(journal, group, index) for index in range(2)])
        journal.put_scores(group, {0: OK, 1: score}, [("seen", 1.5), ("seen", 0.1 + 0.2)])
    journal.resume(0)
    assert journal.logged(kept) == [("seen", 1.5), ("seen", 0.1 + 0.2)]
    assert (journal.logged(failed), journal.scores(failed)) == ([], {})
    journal.use(kept, 0, TRAINED)
    journal.contain(1, oldest=1)
    assert journal.logged(kept) == []


def test_uses_that_do_not_account_for_their_tokens_are_found_at_the_checkpoint(journal):
    group = sampled_group(journal)
    journal.use(group, 0, TRAINED)
    journal._db.execute("UPDATE use SET tokens = 7")
    with pytest.raises(AssertionError, match="group 1: 7 tokens used, 8 trained, 0 masked, 8 sampled"):
        journal.contain(1, oldest=1)


def test_uses_after_the_checkpoint_become_void_and_their_groups_are_used_again(journal):
    groups = [sampled_group(journal, step, f"p{step}") for step in range(4)]
    for step, group in enumerate(groups):
        journal.use(group, step, TRAINED)
    journal.contain(2, oldest=2)
    assert [list(journal.completions(group)) for group in groups] == [[], [], [0, 1], [0, 1]]
    assert journal.resume(2) == 2
    assert [(use.step, use.checkpoint, use.void) for group in groups for use in journal.uses(group)] == [
        (0, 2, None), (1, 2, None), (2, None, 2), (3, None, 2)
    ]  # fmt: skip
    assert (journal.sums().trained, journal.sums().open) == (16, 16)
    journal.use(groups[2], 2, ZERO_ADVANTAGE)
    assert [(use.reason, use.void) for use in journal.uses(groups[2])] == [("trained", 2), ("zero_advantage", None)]
    assert journal.resume(2) == 1


def test_resume_contains_what_its_checkpoint_does_when_the_run_died_before_saying_so(journal):
    group = sampled_group(journal)
    journal.use(group, 4, TRAINED)
    assert journal.resume(5) == 0
    assert journal.uses(group)[0].checkpoint == 5


def test_arrays_stay_while_an_older_checkpoint_may_be_resumed_from(journal):
    groups = [sampled_group(journal, step, f"p{step}") for step in range(4)]
    for step, group in enumerate(groups):
        journal.use(group, step, TRAINED)
    journal.contain(2, oldest=2)
    journal.contain(4, oldest=2)
    assert journal.resume(2) == 2  # the checkpoint of step 4 was damaged
    assert [list(journal.completions(group)) for group in groups] == [[], [], [0, 1], [0, 1]]
    assert [use.checkpoint for group in groups for use in journal.uses(group)] == [2, 2, 4, 4]


def test_a_completion_whose_arrays_are_gone_is_sampled_and_scored_again(journal):
    group = sampled_group(journal)
    journal.use(group, 0, TRAINED)
    journal.contain(1, oldest=1)
    journal.resume(0)
    assert journal.completions(group) == {}
    journal.put_completions([completion(journal, group, 0)])
    assert list(journal.completions(group)) == [0] and list(journal.scores(group)) == [1]
    assert (journal.sums().sampled, journal.sums().open, journal.sums().wasted) == (12, 8, {"resampled": 4})


def test_dropped_arrays_make_room_for_new_ones(tmp_path):
    sizes = []
    with Journal(tmp_path / "journal.sqlite") as journal:
        for step in range(12):
            group = begin(journal, step, f"p{step}")
            journal.put_completions([completion(journal, group, index, tokens=20_000) for index in range(2)])
            journal.use(group, step, TRAINED)
            journal.contain(step + 1, oldest=step)
            sizes.append(sum(file.stat().st_size for file in tmp_path.iterdir()))
    assert 300_000 < sizes[3] == sizes[-1] < 1_500_000


# --- Other writers, other files ---------------------------------------------------------------------------------------


def run_python(code: str, *args: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], cwd=HERE, capture_output=True, text=True, timeout=60)


OPEN = "import sys; from data.journal import Journal; Journal(sys.argv[1])"


def test_a_second_writer_is_refused_and_a_killed_one_leaves_no_lock(journal, tmp_path):
    second = run_python(OPEN, journal.path)
    assert second.returncode == 1
    reason = second.stderr.splitlines()[-1]
    assert f"{journal.path}: in use by process {os.getpid()} on" in reason and "choose another run.name" in reason
    journal.close()
    killed = run_python(OPEN + "; import os; os.kill(os.getpid(), 9)", journal.path)
    assert killed.returncode == -signal.SIGKILL
    Journal(journal.path).close()


def test_a_child_made_by_fork_does_not_keep_the_lock(journal):
    child = os.fork()
    if child == 0:
        signal.pause()
    try:
        journal.close()
        assert run_python(OPEN, journal.path).returncode == 0
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_reader_reads_beside_the_writer_and_cannot_write(journal):
    group = sampled_group(journal)
    with Journal(journal.path, read_only=True) as reader:
        assert reader.sums().open == 8
        journal.use(group, 0, TRAINED)
        assert reader.sums().trained == 8
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            reader.set_meta(seed=1)


def text(path: Path) -> None:
    path.write_bytes(b"not a database, " * 400)


def damage(path: Path) -> None:
    with Journal(path) as journal:
        for position in range(200):
            sampled_group(journal, position, f"p{position}")
    content = bytearray(path.read_bytes())
    content[8192:40_000] = os.urandom(40_000 - 8192)
    path.write_bytes(content)


def other_format(path: Path) -> None:
    Journal(path).close()
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()


def foreign(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE theirs (x)")
    database.close()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (text, r"not readable as a journal \(file is not a database\); move it away to start anew, or restore a copy"),
        (damage, r"(a damaged journal|not readable as a journal) \(.*\); move it away to start anew, or restore a copy"),
        (foreign, r"an SQLite file, but no journal of Cohort; move it away, or choose another run\.name"),
        (other_format, r"a journal of format 99, and this version reads 2; use the version that wrote it"),
    ],
)
def test_a_file_that_is_no_good_journal_is_one_line(make, message, tmp_path):
    path = tmp_path / "journal.sqlite"
    make(path)
    before = path.read_bytes()
    with pytest.raises(InputError, match=f"^{path}: {message}$"):
        Journal(path)
    assert path.read_bytes() == before
    path.unlink()
    Journal(path).close()


def test_a_reader_needs_a_journal(tmp_path):
    with pytest.raises(InputError, match="no journal here; name the folder of a run that has begun"):
        Journal(tmp_path / "journal.sqlite", read_only=True)
    assert list(tmp_path.iterdir()) == []


# --- Killed anywhere --------------------------------------------------------------------------------------------------


def life(path: Path, kill_at: int) -> None:
    """Six steps of two groups, with a checkpoint after every second; killed at the n-th SQL statement if there are so many."""
    with Journal(path) as journal:
        statements = iter(range(1, sys.maxsize))
        if kill_at:
            journal._db.set_trace_callback(lambda _: os.kill(os.getpid(), signal.SIGKILL) if next(statements) == kill_at else None)
        start = journal.meta("contained") or 0
        journal.resume(start)
        for step in range(start, 6):
            slots = [Slot("run", position, f"p{position % 3}") for position in (2 * step, 2 * step + 1)]
            for attempt in journal.begin(slots, 3, version=step, step=step):
                group = attempt.group_id
                held = journal.completions(group)
                journal.put_completions([completion(journal, group, i) for i in range(3) if i not in held])
                scored = journal.scores(group)
                journal.put_scores(group, {i: Score(float(i)) for i in range(3) if i not in scored})
                journal.use(group, step, TRAINED)
            if step % 2:
                journal.contain(step + 1, oldest=step + 1)


def account(path: Path) -> list:
    with Journal(path, read_only=True) as journal:
        tables = ("attempt", "completion", "score", "waste")
        rows = [journal._db.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall() for table in tables]
        return [*rows, journal._db.execute("SELECT attempt, step, reason FROM use WHERE void IS NULL ORDER BY 1").fetchall()]


def killed_life(path: Path, kill_at: int) -> bool:
    """Whether the n-th statement came; a forked child lives, so that the kill is a real one."""
    child = os.fork()
    if child == 0:
        life(path, kill_at)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_killed_between_any_two_statements_nothing_is_lost_or_done_twice(tmp_path):
    life(tmp_path / "whole.sqlite", kill_at=0)
    expected = account(tmp_path / "whole.sqlite")
    points = random.Random(0).sample(range(1, 240), 10)
    for point in points:
        path = tmp_path / f"{point}.sqlite"
        assert killed_life(path, point), f"life ended before statement {point}"
        with Journal(path, read_only=True) as journal:
            per_group = "SELECT (SELECT count(*) FROM {} WHERE attempt = key) FROM attempt"
            for table in ("completion", "score"):
                assert {count for (count,) in journal._db.execute(per_group.format(table))} <= {0, 3}
            journal.sums()
        killed_life(path, point // 2 + 1)
        assert not killed_life(path, 0)
        assert account(path) == expected


# --- Any order of events ----------------------------------------------------------------------------------------------


class AnyOrder(RuleBasedStateMachine):
    """Random work on a journal beside a model of it: a dict from group to what is known of it."""

    folder: Path
    names = itertools.count()

    @initialize()
    def start(self) -> None:
        self.path = self.folder / f"{next(self.names)}.sqlite"
        self.journal = Journal(self.path)
        self.step = self.contained = 0
        self.sampled = 0
        self.held: dict[str, dict[int, int]] = {}
        self.ok: dict[str, set[int]] = {}
        self.failed: dict[str, set[int]] = {}
        self.live: dict[str, tuple[int, str]] = {}
        self.gone: set[tuple[str, int]] = set()

    def teardown(self) -> None:
        self.journal.close()

    def group(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.held)))

    @rule(position=st.integers(0, 5))
    def begin(self, position: int) -> None:
        group = begin(self.journal, position, f"p{position % 2}", step=self.step)
        self.held.setdefault(group, {})
        self.ok.setdefault(group, set())
        self.failed.setdefault(group, set())

    @precondition(lambda self: self.held)
    @rule(data=st.data(), index=st.integers(0, 2), tokens=st.integers(0, 5), finish=st.sampled_from(["stop", "abort"]))
    def complete(self, data: st.DataObject, index: int, tokens: int, finish: str) -> None:
        group = self.group(data)
        self.journal.put_completions([completion(self.journal, group, index, tokens, finish_reason=finish)])
        again = index in self.held[group] and not ((group, index) in self.gone and group not in self.live)
        if finish == "abort" or not again:
            self.sampled += tokens
        if finish == "abort" or again or (index not in self.held[group] and group in self.live):
            return
        if index in self.held[group]:
            self.ok[group].discard(index)
            self.failed[group].discard(index)
            self.gone.discard((group, index))
        self.held[group][index] = tokens

    @precondition(lambda self: self.held)
    @rule(data=st.data(), index=st.integers(0, 2), ok=st.booleans())
    def score(self, data: st.DataObject, index: int, ok: bool) -> None:
        group = self.group(data)
        first = index not in self.journal.scores(group)
        self.journal.put_scores(group, {index: OK if ok else Score(None, "error")})
        if first:
            (self.ok if ok else self.failed)[group].add(index)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), reason=st.sampled_from([TRAINED, STALE, ZERO_ADVANTAGE]))
    def use(self, data: st.DataObject, reason: str) -> None:
        group = self.group(data)
        if group not in self.live:
            self.journal.use(group, self.step, reason)
            trained = sum(n for i, n in self.held[group].items() if i in self.ok[group]) if reason == TRAINED else 0
            self.live[group] = (self.step, reason)
            assert self.journal.uses(group)[-1].trained == trained

    @rule()
    def end_step(self) -> None:
        self.step += 1

    @rule(back=st.integers(0, 2))
    def checkpoint(self, back: int) -> None:
        oldest = max(self.step - back, 0)
        self.journal.contain(self.step, oldest)
        self.contained = self.step
        self.gone |= {(group, i) for group, (step, _) in self.live.items() if step < oldest for i in self.held[group]}

    @rule(back=st.integers(0, 2))
    def die_and_resume(self, back: int) -> None:
        self.journal.close()
        self.journal = Journal(self.path)
        self.step = self.contained = max(self.contained - back, 0)
        voided = self.journal.resume(self.step)
        later = [group for group, (step, _) in self.live.items() if step >= self.step]
        assert voided == len(later)
        for group in later:
            del self.live[group]
        for group, failed in self.failed.items():
            if failed and group not in self.live:  # what made one fail may have been mended: all are asked again
                self.ok[group].clear()
                failed.clear()

    @invariant()
    def sums_close(self) -> None:
        sums = self.journal.sums()
        assert sums.sampled == sums.trained + sum(sums.wasted.values()) + sums.open == self.sampled
        assert Counter(reason for _, reason in self.live.values()) == {k: n for k, n in sums.groups.items() if k != "open"}
        assert sums.groups["open"] == len(self.held) - len(self.live)
        assert sums.open == sum(sum(held.values()) for group, held in self.held.items() if group not in self.live)
        for group, held in self.held.items():
            assert set(self.journal.completions(group)) == {i for i in held if (group, i) not in self.gone}


def test_in_any_order_the_sums_close_and_every_group_has_one_end(tmp_path):
    AnyOrder.folder = tmp_path
    machine = AnyOrder.TestCase
    machine.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
    machine().runTest()

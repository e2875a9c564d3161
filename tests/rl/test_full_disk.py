"""A disk that is full, wherever in the run, is one line, leaves the last checkpoint, and the same command goes on when there is room."""

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from killing import differences, forked, in_child, make_policy, make_recipe, train_on_a_disk_that_fills

DISK_BYTES = 64 << 20


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def whole(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert forked(make_recipe(folder, policy)) == 0
    return folder / "run"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(place)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here ({mounted.stderr.strip()}); it takes root")
    with ExitStack() as stack:
        stack.callback(subprocess.run, ["umount", str(place)], check=True)
        yield place


@pytest.mark.parametrize(
    ("where", "left_bytes", "said"),
    [
        (("data.journal", "Journal", "put_completions", 14), 0, "no space for what the run writes"),  # SQLite
        (("rl.checkpoint", "Checkpoints", "save", 2), 1_600_000, "no space for the checkpoint of step 4"),  # in the optimizer's state
        (("rl.run", "Run", "finish", 1), 40_000, "no space for what the run writes"),
    ],
)
def test_a_full_disk_is_one_line_and_the_run_goes_on(where, left_bytes, said, disk, policy, whole):
    recipe = make_recipe(disk, policy)
    assert in_child(train_on_a_disk_that_fills, recipe, *where, left_bytes) == 2
    text = (disk / "output.log").read_text()
    lines = [line for line in text.splitlines() if "no space" in line]
    assert len(lines) == 1 and said in lines[0] and "start again with the same command" in lines[0], text
    assert "Traceback" not in text
    last = 6 if where[2] == "finish" else 2
    assert f"the last checkpoint, {disk / 'run' / 'checkpoints' / f'step-{last}'}, is intact" in lines[0]
    assert not list((disk / "run" / "checkpoints").glob(".*"))
    (disk / "filler").unlink()
    assert forked(recipe) == 0, (disk / "output.log").read_text()
    assert differences(disk / "run", whole) == []

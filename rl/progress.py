"""What people see of a run: a line a step, and on a terminal a bar beneath it that says what is going on right now.

Model text never comes here, and what does is escaped where it could hold markup.
"""

from collections.abc import Mapping

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Display:
    """A context manager; a display that is not shown (ranks other than 0) prints nothing."""

    def __init__(self, name: str, steps: int, start: int, shown: bool):
        self.console = Console(quiet=not shown, highlight=False, soft_wrap=True)
        self.steps = steps
        self.bar = Progress(
            TextColumn(f"[bold]{escape(name)}[/]"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.description}"), TimeElapsedColumn(), TimeRemainingColumn(),
            console=self.console, disable=not (shown and self.console.is_terminal), transient=True,
        )  # fmt: skip
        self.task: TaskID = self.bar.add_task("starting", total=steps, completed=start)

    def __enter__(self) -> "Display":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def say(self, text: str) -> None:
        """A line of its own."""
        self.console.print(escape(text))

    def phase(self, text: str) -> None:
        """What is going on, beside the bar."""
        self.bar.update(self.task, description=escape(text))

    def step(self, done: int, row: Mapping[str, float]) -> None:
        """The line of a step."""
        self.bar.update(self.task, completed=done)
        self.console.print(escape(step_line(done, self.steps, row)))


def step_line(done: int, steps: int, row: Mapping[str, float]) -> str:
    """`step 12/60  reward 0.512 ± 0.31  length 24.1  …  sample 1.9 s  learn 0.8 s`."""
    width = len(str(steps))
    parts = [
        f"step {done:>{width}}/{steps}",
        f"reward {row['reward']:.3f} ± {row['reward_std']:.2f}",
        f"length {row['completions/mean_length']:.1f}",
        f"entropy {row['sampling/entropy']:.3f}",
        f"teach {row['groups/trained']:.0f}/{row['groups/sampled']:.0f}",
        f"sample {row['time/rollout_s']:.1f} s",
        f"score +{row['time/reward_s']:.1f} s",
        f"learn {row['time/learn_s']:.1f} s",
        f"sync {row['time/sync_s']:.2f} s",
    ]
    if "eval/pass@1" in row:
        parts.append(f"held-out pass@1 {100 * row['eval/pass@1']:.1f} %")
    return "  ".join(parts)

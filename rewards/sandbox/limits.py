"""What a program may take. Every limit holds for each program alone, however many run at once."""

from dataclasses import dataclass

BACKENDS = ("namespaces", "bubblewrap", "landlock")
"""From the default to the weaker; bubblewrap is used where it is asked for."""
PATIENCE = 4
"""Times `wall_s` that a program may take on a machine whose CPUs others have."""
REQUEST_BYTES = 1 << 14
"""Of a message between judge and server."""


class SandboxError(Exception):
    """The sandbox failed, not the program in it."""


@dataclass(frozen=True)
class Limits:
    wall_s: float = 10.0
    """Seconds from its start to its end. While it has no second thread or process, those in which it was ready to run and other programs
    had the CPU do not count; with them it has at most PATIENCE times as many."""
    cpu_s: int = 6
    """CPU seconds of each of its processes, and of all that live at one time together; whole seconds, as rlimits are."""
    memory_mb: int = 1024
    """MiB of address space of each process, and of memory of all its processes together."""
    processes: int = 64
    """Processes and threads."""
    output_mb: int = 16
    """MiB that it may write to stdout, to stderr, and to any one file."""
    files_mb: int = 64
    """MiB in its temporary folder; 16384 files."""
    open_files: int = 256
    """Descriptors of each process."""

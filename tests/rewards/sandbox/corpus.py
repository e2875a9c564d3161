"""The corpus of programs, and what runs it on one backend: `python corpus.py CHECKOUT BACKEND whole|sample` prints a JSON report.

It runs as a process of its own, so that the user can be root or not, and so that what it leaves behind can be counted: its secret in
the environment, a file, sockets that listen. Programs run 8 at once, hostile beside honest.
"""

import importlib.util
import json
import os
import random
import shutil
import socket
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
AT_ONCE = 8
SECRET = "sk-canary-do-not-leak"
ALWAYS = (
    "daemon",
    "cpu_limit_ignored",
    "disk_without_names",
    "memory_in_sockets",
    "deep_folders",
    "leave_the_tracer",
    "cpu_of_many_processes",
)
PRELUDE = """
import sys, os, json, ctypes
T = json.loads(sys.stdin.readline() or "null")
NUMBERS = T and T["numbers"]
def call(number, *arguments):
    number = NUMBERS[number] if isinstance(number, str) else number
    libc = ctypes.CDLL(None, use_errno=True)
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = libc.syscall(ctypes.c_long(number), *wide)
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return result
def held(*attempts):
    for attempt in attempts:
        try:
            print("ESCAPED", attempt())
            return
        except Exception:
            pass
    print("HELD")
"""
# Not refused for other reasons: the call of the kernel that gives the process id must work.
CALLS = {"x86_64": {"clone": 56, "clone3": 435, "prctl": 157}, "aarch64": {"clone": 220, "clone3": 435, "prctl": 167}}


@dataclass(frozen=True)
class Program:
    name: str
    source: str
    want: tuple[str, ...]
    test: dict[str, Any] | None
    wall_s: float | None
    needs: str | None

    @property
    def hostile(self) -> bool:
        return self.want != ("passed",)


def read(kind: str) -> list[Program]:
    """The programs of `hostile` or `honest`."""
    programs = []
    for block in (HERE / f"{kind}.txt").read_text().split("\n#=== ")[2:]:
        head, _, source = block.partition("\n")
        head, _, test = head.partition(" test=")
        name, *words = head.split()
        keys = dict(word.split("=") for word in words)
        want = tuple(keys["want"].split("|")) if kind == "hostile" else ("passed",)
        wall_s = float(keys["wall"]) if "wall" in keys else None
        programs.append(Program(name, source + "\n", want, json.loads(test) if test else None, wall_s, keys.get("needs")))
    assert len({program.name for program in programs}) == len(programs)
    return programs


class Targets:
    """What is worth reaching, and what was reached."""

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="canary-", dir="/tmp")
        os.chmod(self.folder, 0o755)
        self.file = os.path.join(self.folder, "secret")
        Path(self.file).write_text(SECRET)
        os.chmod(self.file, 0o644)
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.unix, self.abstract = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        self.datagram = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.names = {"unix": f"{self.folder}/unix", "abstract": f"canary-{os.getpid()}", "datagram": f"{self.folder}/datagram"}
        self.unix.bind(self.names["unix"])
        self.abstract.bind("\0" + self.names["abstract"])
        self.datagram.bind(self.names["datagram"])
        for name in ("unix", "datagram"):
            os.chmod(self.names[name], 0o777)
        for listener in (self.unix, self.abstract):
            listener.listen()

    def line(self, numbers: dict[str, int]) -> str:
        addresses = {"file": self.file, "tcp": self.tcp.getsockname()[1], "pid": os.getpid(), **self.names}
        return json.dumps(addresses | {"numbers": numbers}) + "\n"

    def reached(self) -> list[str]:
        found = []
        for name, listener in (("tcp", self.tcp), ("unix", self.unix), ("abstract", self.abstract), ("datagram", self.datagram)):
            listener.setblocking(False)
            try:
                listener.recv(10) if name == "datagram" else listener.accept()
                found.append(name)
            except BlockingIOError:
                pass
        if Path(self.file).read_text() != SECRET or os.stat(self.file).st_mode & 0o777 != 0o644 or os.stat(self.file).st_nlink != 1:
            found.append("file")
        return found


def process_ids_below() -> list[str]:
    """All that descends from this process; whatever lost its parent comes to it, as it is a subreaper."""
    from rewards.sandbox.processes import children, tree

    return [str(pid) for pid in tree(os.getpid(), children())[1:]]


def left_behind() -> dict[str, list[str]]:
    """What a sandbox must not leave: processes, folders, shared memory, mounts."""
    shared = os.listdir("/dev/shm") if os.path.isdir("/dev/shm") else []
    return {
        "processes": sorted(process_ids_below()),
        "folders": sorted(name for name in os.listdir("/tmp") if name.startswith("cohort-sandbox-")),
        "shared": sorted(name for name in shared if not name.startswith(("torch_", "psm_", "__KMP"))),
        "mounts": Path("/proc/self/mounts").read_text().splitlines(),
    }


def owner(path: str) -> int | None:
    try:
        return os.stat(path).st_uid
    except FileNotFoundError:
        return None


def chosen(which: str) -> list[Program]:
    """`whole`, names with commas between them, or `sample`: the bombs and what else has once broken out, and a ninth of all others."""
    programs = read("hostile") + read("honest")
    if which == "whole":
        return programs
    if which == "sample":
        return [p for index, p in enumerate(programs) if index % 9 == 0 or "bomb" in p.name or p.name in ALWAYS]
    return [p for p in programs if p.name in which.split(",")]


def run(backend: str, which: str) -> dict[str, Any]:
    from rewards.code_tests import run_test
    from rewards.sandbox import kernel
    from rewards.sandbox.judge import Sandbox
    from rewards.sandbox.limits import Limits
    from rewards.sandbox.seccomp import REFUSED

    kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
    machine = os.uname().machine
    column = list(CALLS).index(machine)
    numbers = {name: pair[column] for name, pair in REFUSED.items() if pair[column] is not None} | CALLS[machine]
    before, targets = left_behind(), Targets()
    os.environ["API_KEY"] = SECRET
    programs = [p for p in chosen(which) if p.needs is None or importlib.util.find_spec(p.needs)]
    random.Random(0).shuffle(programs)
    usual = Limits(cpu_s=4, wall_s=25.0, processes=32, memory_mb=640, output_mb=12, files_mb=32)

    def one(program: Program) -> dict[str, Any]:
        test, source, limits = program.test, program.source, usual
        if program.hostile:
            limits = Limits(**{**usual.__dict__, "cpu_s": 2, "memory_mb": 400, "wall_s": program.wall_s or 30.0})
            source = PRELUDE + source
            test = test or {"stdin": targets.line(numbers), "stdout": "7919"}
        began = time.monotonic()
        verdict = run_test(sandbox, source, test or {"stdin": "", "stdout": "OK"}, limits)
        name = "held" if verdict.name == "wrong" and verdict.wrote == "HELD\n" else verdict.name
        right = name in program.want and "ESCAPED" not in verdict.wrote
        seconds = time.monotonic() - began
        return {"name": program.name, "hostile": program.hostile, "right": right, "verdict": name, "said": verdict.said,
                "wrote": verdict.wrote, "seconds": seconds}  # fmt: skip

    with Sandbox(backend) as sandbox, ThreadPoolExecutor(AT_ONCE) as threads:
        results = list(threads.map(one, programs))
        facts = sandbox.facts
    after = left_behind()
    left = {key: sorted(set(after[key]) - set(before[key])) for key in after}
    left["shared"] = [name for name in left["shared"] if owner(f"/dev/shm/{name}") == facts["uid"]]  # others make some meanwhile
    reached = targets.reached()
    shutil.rmtree(targets.folder)
    return {"uid": os.getuid(), "facts": facts, "results": results, "reached": reached, "left": left}


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    print(json.dumps(run(*sys.argv[2:])))

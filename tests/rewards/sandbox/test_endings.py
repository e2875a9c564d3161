"""Nothing of a program outlives its sandbox, whichever process of ours is killed or hangs, and whatever the program did before."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from watching import processes_with, sessions_of, wait_until

from rewards.sandbox.processes import children

CHECKOUT = Path(__file__).resolve().parents[3]
BACKENDS = ["namespaces", "landlock", "bubblewrap"]
JUDGE = """
import sys, threading
from rewards.sandbox.judge import Sandbox
from rewards.sandbox.limits import Limits
sandbox = Sandbox(sys.argv[1], [sys.argv[2]])
limits = Limits(wall_s=120.0)
programs = [threading.Thread(target=sandbox.script, args=(open(sys.argv[3]).read(), "", limits), daemon=True) for _ in range(2)]
for program in programs:
    program.start()
print(sandbox._process.pid, flush=True)
for program in programs:
    program.join()
"""
# Leaves sessions, groups and parents behind, ignores every signal, forgets whom it dies with, and goes on without end.
PROGRAM = """
import ctypes, os, signal, time
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
for _ in range(4):
    if not os.fork():
        os.setsid()
        ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
        if os.fork():
            os._exit(0)
        break
open("here", "w").close()
while True:
    time.sleep(0.2)
    if not os.fork():
        os._exit(0)
    try:
        os.waitpid(-1, os.WNOHANG)
    except OSError:
        pass
"""


@pytest.mark.parametrize("victim", ["judge", "guard", "server", "judge of a server that hangs"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_process_outlives_its_sandbox(backend, victim, tmp_path):
    if backend == "bubblewrap" and not shutil.which("bwrap"):
        pytest.skip("bubblewrap is not installed")
    tmp_path.chmod(0o755)
    mark = str(tmp_path / "readable")
    Path(mark).mkdir()
    (tmp_path / "program.py").write_text(PROGRAM)
    before = set(os.listdir("/tmp"))
    command = [sys.executable, "-c", JUDGE, backend, mark, str(tmp_path / "program.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=CHECKOUT, text=True) as judge:
        try:
            guard = int(judge.stdout.readline())
            (server,) = children()[guard]
            # The judge's and the guard's, bubblewrap's for each program, and four that each program has begun: these only grow in
            # number, while the forks of a program come and go.
            begun = 2 + 2 * (backend == "bubblewrap") + 2 * 4
            assert wait_until(lambda: len(sessions_of(processes_with(mark))) >= begun, 30.0), processes_with(mark)
            if victim == "judge of a server that hangs":
                os.kill(server, signal.SIGSTOP)
            os.kill({"guard": guard, "server": server}.get(victim, judge.pid), signal.SIGKILL)
            assert wait_until(lambda: not set(processes_with(mark)) - {judge.pid}, 15.0), processes_with(mark)
            if victim != "guard":
                left = {name for name in set(os.listdir("/tmp")) - before if name.startswith("cohort-sandbox-")}
                assert wait_until(lambda: not [name for name in left if os.path.exists(f"/tmp/{name}")], 10.0), left
        finally:
            judge.kill()
            for pid in processes_with(mark):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

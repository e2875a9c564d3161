"""The sandbox as a judge uses it: jobs in, and how each ended, what it wrote and what it gave.

`Sandbox.run` may be called from several threads; each call is one program in one fresh process. What a program writes goes into
files without a name that only this process and the program have, and is read when all of the program is dead.
"""

import json
import os
import secrets
import signal
import socket
import subprocess
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from typing import Any

from rewards.sandbox.confine import ENVIRONMENT
from rewards.sandbox.launch import python_command
from rewards.sandbox.limits import BACKENDS, PATIENCE, REQUEST_BYTES, Limits, SandboxError
from rewards.sandbox.values import NotPlain, encode, parse

_START_S = 30.0
_GRACE_S = 60.0
"""How long after a job's wall time the server may take to say that it ended, before it counts as broken; other work may hold the CPUs."""
_CLOSE_S = 10.0
"""How long the server's guard may take to end all of it."""


@dataclass(frozen=True)
class Ending:
    """How a job ended and what came of it."""

    how: str
    """`exit` or `signal`; `timeout`, `memory`, `processes`, `files`, `output` for the limit it was killed for; `stopped` by us."""
    code: int
    """The exit code or the signal."""
    stdout: bytes
    stderr: bytes
    result: dict[str, Any] | None
    """What it wrote as a result with the right nonce."""
    wall_s: float
    cpu_s: float
    waited_s: float
    """Of wall_s, what it was ready to run in and other programs had the CPU, to a twentieth of a second."""


class Sandbox:
    """A fork server and the jobs it runs. `backend`: one of BACKENDS, or `auto`; `paths`: what programs may read beside Python."""

    def __init__(self, backend: str = "auto", paths: Sequence[str] = ()) -> None:
        if backend not in (*BACKENDS, "auto"):
            raise ValueError(f"no sandbox backend '{backend}'; there are {', '.join(('auto', *BACKENDS))}")
        self._paths = list(paths)
        self._lock = threading.Lock()
        self._waiting: dict[int, Future[dict[str, Any]]] = {}
        self._next = 0
        self.facts: dict[str, Any] = {}
        """What the server said of itself: `landlock`, its version; `uid`; `proc`, whether programs have one."""
        self.warning = ""
        """What its user must be told; empty where the best backend runs."""
        self.backend = self._start(backend)

    def script(self, source: str, stdin: str = "", limits: Limits = Limits()) -> Ending:  # noqa: B008 - it is frozen
        """Runs a program with that stdin."""
        return self._run({"kind": "script", "source": source}, limits, stdin.encode("utf-8", "surrogateescape"))

    def call(self, source: str, function: str, args: Sequence[Any], limits: Limits = Limits()) -> Ending:  # noqa: B008
        """Runs a program and then one function of it; `result["value"]` is what it gave, as `values.encode` writes it."""
        return self._run({"kind": "call", "source": source, "function": function, "args": encode(list(args))}, limits)

    def command(
        self, argv: Sequence[str], file: str, text: str, limits: Limits = Limits(),  # noqa: B008
        keep: Sequence[str] = (), beside: Mapping[str, str] | None = None,
    ) -> Ending:  # fmt: skip
        """Runs a command in a folder where `text` is in `file`, and `beside` (bytes as hexadecimal digits, by name) beside it.

        `keep`: files that `result["files"]` then has in the same form, as far as they are there; what is in them is the text's word.
        """
        job = {"kind": "command", "argv": list(argv), "file": file, "source": text, "keep": list(keep), "beside": dict(beside or {})}
        return self._run(job, limits)

    def check(self, source: str, asserts: str, names: Sequence[str] = (), limits: Limits = Limits()) -> tuple[Ending, Ending]:  # noqa: B008
        """Runs asserts about a program, each in its own process; the endings of the program and of the asserts.

        `names`: builtins that the program defines anew and the asserts mean so.
        """
        nonce = secrets.token_hex(16)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            program = self._begin({"kind": "serve", "source": source, "nonce": nonce}, limits, b"", theirs.fileno())
            job = {"kind": "asserts", "text": asserts, "names": list(names), "nonce": nonce}
            # They wait for the program, which has a limit of its own, and as long as that may wait for a CPU.
            judged = self._begin(job, replace(limits, wall_s=PATIENCE * limits.wall_s), b"", ours.fileno())
        verdict = self._end(judged)
        if verdict.result is None or verdict.result["verdict"] != "ended":
            self._send({"stop": program.number})
        return self._end(program), verdict

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """Ends the server and all that runs."""
        try:
            self._control.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the server is gone already
        try:
            self._process.wait(timeout=_CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()  # the server ends with its guard, and all programs with the server
            self._process.wait()
        self._control.close()

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, backend: str) -> str:
        refused: list[str] = []
        for name in ("namespaces", "landlock") if backend == "auto" else (backend,):
            said = self._try(name) or self._probe()
            if not said:
                if refused:
                    self.warning = f"sandbox: the weaker backend '{name}' runs model-written programs: {'; '.join(refused)}"
                return name
            self.close()
            refused.append(f"{name} was refused: {said}")
        raise SandboxError(
            f"no isolation for model-written programs: {'; '.join(refused)}. Allow user namespaces (sysctl "
            "user.max_user_namespaces, kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns; in a container, "
            "its seccomp profile) or use a kernel with Landlock (5.13 and newer); `python -m rewards.sandbox doctor` says what is there"
        )

    def _try(self, backend: str) -> str:
        """Starts a server; what it refused to go on with, or nothing."""
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            config = {"backend": backend, "paths": self._paths, "control": theirs.fileno()}
            self._process = subprocess.Popen(
                python_command(json.dumps({"serve": config})),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=ENVIRONMENT,
                cwd="/",
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a signal to our group is not for it: it ends when its socket does
            )
        self._control.settimeout(_START_S)
        try:
            said = json.loads(self._control.recv(REQUEST_BYTES) or '{"refused": "its server died"}')
        except TimeoutError:
            said = {"refused": f"its server was not ready after {_START_S:.0f} s"}
        self._control.settimeout(None)
        self.facts = said.get("ready", {})
        threading.Thread(target=self._listen, args=[self._control], name="sandbox", daemon=True).start()
        return str(said.get("refused", ""))

    def _probe(self) -> str:
        """Runs a first program; what kept it from running, or nothing."""
        try:
            ending = self.script("print(6 * 7)")
        except SandboxError as error:
            return str(error)
        return "" if ending.stdout == b"42\n" else f"a first program failed: {ending.stderr[-300:].decode('utf-8', 'replace')}"

    def _run(self, job: dict[str, Any], limits: Limits, stdin: bytes = b"") -> Ending:
        return self._end(self._begin(job | {"nonce": secrets.token_hex(16)}, limits, stdin))

    def _begin(self, job: dict[str, Any], limits: Limits, stdin: bytes, channel: int | None = None) -> "_Job":
        with self._lock:
            number = self._next
            self._next += 1
            self._waiting[number] = Future()
        begun = _Job(number, job["nonce"], limits, self._waiting[number])
        asked = asdict(limits)
        begun.fill(job | {"limits": asked}, stdin)
        try:
            self._send({"id": number, "limits": asked}, [*begun.fds, *([] if channel is None else [channel])])
        except SandboxError:
            begun.close()
            raise
        return begun

    def _end(self, begun: "_Job") -> Ending:
        try:
            return begun.wait()
        except TimeoutError:
            self.close()  # it hangs: nothing of it goes on, and the next job gets another
            raise SandboxError("the sandbox's server does not say how a program ended") from None
        finally:
            begun.close()

    def _send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        try:
            socket.send_fds(self._control, [json.dumps(message).encode()], fds)
        except OSError as error:
            raise SandboxError(f"the sandbox's server is gone: {error}") from error

    def _listen(self, control: socket.socket) -> None:
        """Hands replies to those who wait; runs in a thread until the server is gone."""
        while True:
            try:
                message = control.recv(REQUEST_BYTES)
            except OSError:
                message = b""
            if not message:
                break
            reply = json.loads(message)
            with self._lock:
                waiting = self._waiting.pop(reply["id"])
            waiting.set_result(reply)
        with self._lock:
            for waiting in self._waiting.values():
                waiting.set_exception(SandboxError("the sandbox's server died"))
            self._waiting.clear()


_shared: dict[tuple[str, tuple[str, ...]], Sandbox] = {}


def shared_sandbox(backend: str, paths: Sequence[str] = ()) -> Sandbox:
    """This process's sandbox for reward functions; a new one in place of one whose server died. For one thread at a time."""
    key = (backend, tuple(paths))
    if key not in _shared or not _shared[key].alive:
        _shared[key] = Sandbox(backend, paths)
    return _shared[key]


class _Job:
    """A job that has begun, and the files between it and us."""

    def __init__(self, number: int, nonce: str, limits: Limits, reply: Future[dict[str, Any]]) -> None:
        self.number = number
        self._nonce = nonce
        self._limits = limits
        self._reply = reply
        self._job, self._stdin, self._stdout, self._stderr, self._result = (os.memfd_create("sandbox") for _ in range(5))
        self.fds = [self._stdin, self._stdout, self._stderr, self._job, self._result]
        """In the order of the program's descriptors."""

    def fill(self, job: dict[str, Any], stdin: bytes) -> None:
        for fd, content in ((self._job, json.dumps(job).encode()), (self._stdin, stdin)):
            with open(fd, "wb", closefd=False) as file:
                file.write(content)
            os.lseek(fd, 0, os.SEEK_SET)

    def wait(self) -> Ending:
        """How it ended; TimeoutError if the server does not say it in time."""
        return self._ending(self._reply.result(PATIENCE * self._limits.wall_s + _GRACE_S))

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)

    def _ending(self, reply: dict[str, Any]) -> Ending:
        started = os.pread(self._job, 3, 0)
        if "failed" in reply or (started != b"ok\n" and not reply["ended_by"]):
            said = "its process died"
            if started == b"no\n":
                said = os.pread(self._job, 4000, 3).decode("utf-8", "replace").strip()
            raise SandboxError(f"a program could not be confined: {reply.get('failed', said)}")
        limit = self._limits.output_mb << 20
        stdout, stderr = os.pread(self._stdout, limit, 0), os.pread(self._stderr, limit, 0)
        how, code = self._how(reply, max(len(stdout), len(stderr)) >= limit)
        return Ending(how, code, stdout, stderr, self._read_result(limit), reply["wall_s"], reply["cpu_s"], reply["waited_s"])

    def _how(self, reply: dict[str, Any], output_full: bool) -> tuple[str, int]:
        status = reply["status"]
        # bubblewrap says 128 and the signal, as a shell does.
        code = status if status >= 0 else -status
        signalled = status < 0 or (status > 128 and reply["by_bubblewrap"])
        if signalled and status > 128:
            code = status - 128
        if reply["ended_by"]:
            return reply["ended_by"], code
        if output_full:
            return "output", code
        # The kernel's limit counts clock ticks, which on a busy machine come to more than the time that it reports.
        if signalled and code in (signal.SIGKILL, signal.SIGXCPU) and reply["cpu_s"] >= self._limits.cpu_s * 0.5:
            return "timeout", code
        return ("signal" if signalled else "exit"), code

    def _read_result(self, limit: int) -> dict[str, Any] | None:
        try:
            result = parse(os.pread(self._result, limit, 0))
        except NotPlain:
            return None
        return result if isinstance(result, dict) and result.get("nonce") == self._nonce else None

"""An engine that is a vLLM process of its own, as the trainer sees it. Imports no vllm: `rl.engines.vllm_worker` is the other half.

The process is forked from a fork server that has vllm imported, so a further engine, or one that died and starts again, costs
seconds and not another import. It stays out of the trainer's process because vLLM replaces `torch.set_num_threads`, starts a
process group and binds memory; and because it can then be killed without harm.

One pipe joins the two halves. Calls go down it in order, and those with an answer wait for it; a reader thread turns what comes
up into events of the mailbox. Values are pickled: both ends are ours, and nothing that a policy wrote is ever unpickled as code.
The pipe is also how each side learns that the other is gone: the trainer's end of it breaks within milliseconds of a kill -9 of
the engine, and the engine ends itself when the trainer's end is closed, whatever closed it. Output of vLLM goes to the log file.
"""

import atexit
import importlib.util
import logging
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from data.values import Completion
from rl.engines.base import Died, EngineDead, Finished, Health, Mailbox, Request, WeightChunk
from rl.engines.server import Answer, Call, Failed, Ready

# Imported first in the fork server, where vllm would otherwise complain on the terminal that it has no Triton.
logging.getLogger("vllm").addHandler(logging.NullHandler())

LOG_LINES = 15
"""Lines of the engine's log in the message that it died."""
HEALTH_s = 30.0
"""An engine that does not answer a health call within this is taken for hung; loading a large policy's weights may take seconds."""


@dataclass(frozen=True)
class VllmSpec:
    """All that the engine's process is told."""

    name: str
    policy_path: Path
    dtype: Literal["float32", "bfloat16"]
    max_model_len: int | None
    """Prompt and completion together, in tokens; None is what the policy's configuration says."""
    slots: int
    threads: int
    tensor_parallel: int
    devices: tuple[int, ...]
    """GPUs by number, `tensor_parallel` of them; none is the CPU."""
    gpu_memory_utilization: float
    """Share of each GPU that it may take."""
    log_path: Path
    asynchronous: bool
    weight_backend: Literal["cohort_file", "nccl"]


def preload() -> None:
    """Lets the fork server begin to import vllm, and returns at once: called early, the first engine has not to wait for it."""
    with _forking:
        multiprocessing.set_forkserver_preload(["rl.engines.vllm", "rl.engines.vllm_worker"])
        multiprocessing.forkserver.ensure_running()


class VllmEngine:
    """Implements `rl.engines.base.Engine`. Several may `start` side by side, in threads; a dead one may `start` again."""

    whole_groups = False

    def __init__(
        self,
        name: str,
        policy_path: Path,
        *,
        log_path: Path,
        dtype: Literal["float32", "bfloat16"] = "float32",
        max_model_len: int | None = None,
        slots: int = 64,
        threads: int = 1,
        tensor_parallel: int = 1,
        devices: tuple[int, ...] = (),
        gpu_memory_utilization: float = 0.85,
        asynchronous: bool = False,
        weight_backend: Literal["cohort_file", "nccl"] = "cohort_file",
    ) -> None:
        """asynchronous: AsyncLLM on a CPU too; on a GPU it always is. The other parameters are those of VllmSpec."""
        self.name = name
        self.slots = slots
        self.spec = VllmSpec(
            name, policy_path, dtype, max_model_len, slots, threads, tensor_parallel, devices, gpu_memory_utilization, log_path,
            asynchronous or bool(devices), weight_backend,
        )  # fmt: skip
        self._link: _Link | None = None

    def start(self, mailbox: Mailbox) -> None:
        self.close()
        self._link = _Link(self.spec, mailbox)
        self._link.ready.result()

    def submit(self, requests: Sequence[Request]) -> None:
        self._alive().post("submit", requests)

    def abort(self, ids: Sequence[str]) -> None:
        self._alive().post("abort", ids)

    def pause(self) -> None:
        self._alive().call("pause").result()

    def resume(self) -> None:
        self._alive().call("resume").result()

    def begin_update(self, version: int) -> None:
        self._alive().call("begin_update", version).result()

    def load(self, chunk: WeightChunk) -> None:
        self._alive().call("load", chunk).result()

    def transfer(self, method: str, info: dict[str, Any]) -> None:
        """Calls a method of vLLM's weight transfer backend on every vLLM worker: for backends that need a rendezvous (nccl)."""
        self._alive().call("transfer", method, info).result()

    def end_update(self) -> None:
        self._alive().call("end_update").result()

    def health(self) -> Health:
        try:
            return self._alive().call("health").result(HEALTH_s)
        except TimeoutError as error:
            raise EngineDead(f"engine {self.name} did not answer for {HEALTH_s:.0f} s\n{log_tail(self.spec.log_path)}") from error

    def close(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None

    @property
    def pid(self) -> int:
        """Of the engine's process."""
        return self._alive().pid

    def _alive(self) -> "_Link":
        if self._link is None:
            raise EngineDead(f"engine {self.name} is not running: it was not started, or closed")
        return self._link


class _Link:
    """One life of an engine's process: the pipe to it, the calls that wait for an answer, and the thread that reads."""

    def __init__(self, spec: VllmSpec, mailbox: Mailbox) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise EngineDead(f"engine {spec.name}: vllm is not installed; run `make install`, or set rollout.engine=hf")
        self.spec = spec
        self.mailbox = mailbox
        self.ready: Future[None] = Future()
        self.waiting: dict[int, Future[Any]] = {}
        self.calls = 0
        self.reason: str | None = None
        """Why it is gone; None while it is not."""
        self.closed = False
        self.lock = threading.Lock()
        spec.log_path.parent.mkdir(parents=True, exist_ok=True)
        spec.log_path.touch()
        preload()
        context = multiprocessing.get_context("forkserver")
        self.pipe, other_end = context.Pipe()
        self.process = context.Process(target=_serve, args=(other_end, spec), name=spec.name)
        with _forking:
            self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid
        other_end.close()
        # It is no daemon, which could have no processes of its own; and multiprocessing waits at exit for one that is none.
        atexit.register(self.close)
        self.reader = threading.Thread(target=self._read, name=f"{spec.name}-reader", daemon=True)
        self.reader.start()

    def post(self, method: str, *args: Any) -> None:
        with self.lock:
            self._send(Call(None, method, args))

    def call(self, method: str, *args: Any) -> Future[Any]:
        answer: Future[Any] = Future()
        with self.lock:
            self.calls += 1
            self.waiting[self.calls] = answer
            self._send(Call(self.calls, method, args))
        return answer

    def close(self) -> None:
        self.closed = True
        atexit.unregister(self.close)
        self._kill()
        self.reader.join()

    def _send(self, call: Call) -> None:
        if self.reason is not None:
            raise EngineDead(self.reason)
        with suppress(BrokenPipeError):  # the reader is about to see the same end, and to learn more of it
            self.pipe.send(call)

    def _read(self) -> None:
        error = ""
        with suppress(EOFError, ConnectionResetError):
            while True:
                match self.pipe.recv():
                    case Completion() as completion:
                        self.mailbox.put(Finished(self.spec.name, completion))
                    case Answer(number, value):
                        # Without the lock: a sender may hold it until the engine reads, and the engine until this reads.
                        self.waiting.pop(number).set_result(value)
                    case Ready():
                        self.ready.set_result(None)
                    case Failed(said):
                        error = said
        self._ended(error)

    def _ended(self, error: str) -> None:
        """The pipe broke: the process is gone or about to be, and whoever waits for it is told why."""
        self._kill()
        self.process.join()
        code = self.process.exitcode
        # -9 after an error is its own doing; without one, someone else's: often the kernel's, out of memory.
        how = error or (f"killed by {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}")
        with self.lock:
            self.reason = f"engine {self.spec.name} is gone: {how}\n{log_tail(self.spec.log_path)}"
            self.pipe.close()
            started = self.ready.done()
            waiting = list(self.waiting.values()) + ([] if started else [self.ready])
        if started and not self.closed:
            self.mailbox.put(Died(self.spec.name, self.reason))
        for answer in waiting:
            answer.set_exception(EngineDead(self.reason))

    def _kill(self) -> None:
        """Ends the process and all it started: it leads a session of its own, unless it is too young to."""
        for kill in (os.killpg, os.kill):
            with suppress(ProcessLookupError):
                kill(self.pid, signal.SIGKILL)


_forking = threading.Lock()
"""multiprocessing starts processes from one thread at a time."""


def _serve(pipe: Connection, spec: VllmSpec) -> None:
    """The engine's process. It leads a session of its own, so that Ctrl-C reaches the trainer alone and it can be killed whole."""
    os.setsid()
    with spec.log_path.open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    # The fork server has imported it already; the trainer must not.
    from rl.engines.vllm_worker import serve

    serve(pipe, spec)


def log_tail(path: Path) -> str:
    """The last lines of an engine's log, indented, under its path."""
    with path.open(errors="replace") as log:
        lines = deque(log, maxlen=LOG_LINES)
    return f"last lines of {path}:\n" + "".join(f"  {line.rstrip()}\n" for line in lines)

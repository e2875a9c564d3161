"""An engine that is a vLLM process of its own, as the trainer sees it. Imports no vllm: `rl.engines.vllm_worker` is the other half.

The process is forked from a fork server that has vllm imported, so a further engine, or one that died and starts again, costs
seconds and not another import. It stays out of the trainer's process because vLLM replaces `torch.set_num_threads`, starts a
process group and binds memory; and because it can then be killed without harm.

One pipe joins the two halves, with two threads at this end of it: calls go down in order, without anybody waiting for an engine
that does not read, and what comes up becomes events of the mailbox and answers. Values are pickled: both ends are ours, and nothing
that a policy wrote is ever unpickled as code. The pipe is also how each side learns that the other is gone: the trainer's end of it
breaks within milliseconds of a kill -9 of the engine, and the engine ends itself when the trainer's end is closed, whatever closed
it; where it hangs, its guard ends it. An engine that lets a call wait too long is killed, and that is its death. Output of vLLM goes
to the log file.
"""

import atexit
import importlib.util
import logging
import multiprocessing
import multiprocessing.forkserver
import os
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

from rl.engines.base import Died, EngineDead, Finished, Health, Mailbox, Part, Pulse, Request, WeightChunk, patience_s
from rl.engines.server import Answer, Call, Failed, Ready, Sampled

# Imported first in the fork server, where vllm would otherwise complain on the terminal that it has no Triton.
logging.getLogger("vllm").addHandler(logging.NullHandler())

LOG_LINES = 15
"""Lines of the engine's log in the message that it died."""
OOM_SCORE = 500
"""Out of memory, the kernel shall take an engine, which can be started again, and not the trainer (which has 0)."""


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
    """GPUs by number among those that this process may see, `tensor_parallel` of them; none is the CPU."""
    gpu_memory_utilization: float
    """Share of each GPU that it may take."""
    log_path: Path
    asynchronous: bool
    stall_s: float
    """An engine that has to read no prompt and says nothing for so long is hung."""
    weight_backend: Literal["cohort_file", "nccl"]
    returns_routes: bool
    """Completions come with the experts that were chosen; on a GPU alone."""
    sleeps: bool
    """Its GPUs are the learner's too; it is put to sleep while the learner has its turn."""
    draft_tokens: int
    """Tokens that the policy's multi-token prediction module drafts at a time; 0 is no speculation."""
    over_nodes: bool
    """vLLM finds `tensor_parallel` GPUs on the Ray cluster of RAY_ADDRESS, more than a node has. Has not run."""


def preload() -> None:
    """Lets the fork server begin to import vllm, and returns at once: called early, the first engine has not to wait for it."""
    with _forking:
        multiprocessing.set_forkserver_preload(["rl.engines.vllm", "rl.engines.vllm_weights", "rl.engines.vllm_worker"])
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
        stall_s: float = 60.0,
        weight_backend: Literal["cohort_file", "nccl"] = "cohort_file",
        returns_routes: bool = False,
        sleeps: bool = False,
        draft_tokens: int = 0,
        over_nodes: bool = False,
    ) -> None:
        """asynchronous: AsyncLLM on a CPU too; on a GPU it always is. The other parameters are those of VllmSpec."""
        self.name = name
        self.slots = slots
        self.spec = VllmSpec(
            name, policy_path, dtype, max_model_len, slots, threads, tensor_parallel, devices, gpu_memory_utilization, log_path,
            asynchronous or bool(devices) or over_nodes, stall_s, weight_backend, returns_routes, sleeps, draft_tokens,
            over_nodes,
        )  # fmt: skip
        self._link: _Link | None = None

    def start(self, mailbox: Mailbox) -> None:
        self.close()
        self._link = link = _Link(self.spec, mailbox)
        link.ready.result()

    def submit(self, requests: Sequence[Request]) -> None:
        self._alive().post("submit", requests)

    def abort(self, ids: Sequence[str]) -> None:
        self._alive().post("abort", ids)

    def pause(self) -> None:
        self._alive().ask("pause")

    def resume(self) -> None:
        self._alive().ask("resume")

    def begin_update(self, version: int) -> None:
        self._alive().ask("begin_update", version)

    def load(self, chunk: WeightChunk) -> None:
        self._alive().ask("load", chunk)

    def transfer(self, method: str, info: dict[str, Any]) -> None:
        """Calls a method of vLLM's weight transfer backend on every vLLM worker: for backends that need a rendezvous (nccl)."""
        self._alive().ask("transfer", method, info)

    def end_update(self) -> None:
        self._alive().ask("end_update")

    def sleep(self) -> None:
        self._alive().ask("sleep")

    def wake(self, part: Part) -> None:
        self._alive().ask("wake", part)

    def health(self) -> Health:
        return self._alive().ask("health")

    def last_words(self) -> str:
        return log_tail(self.spec.log_path)

    def close(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()

    @property
    def pid(self) -> int:
        """Of the engine's process."""
        return self._alive().pid

    def _alive(self) -> "_Link":
        if self._link is None or not self._link.ready.done():
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
        self.outbox: SimpleQueue[Call | None] = SimpleQueue()
        self.heard = time.monotonic()
        """When it last said something."""
        self.silent: str | None = None
        """What it was killed for leaving undone."""
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
        self.writer = threading.Thread(target=self._write, name=f"{spec.name}-writer", daemon=True)
        self.writer.start()
        self.reader = threading.Thread(target=self._read, name=f"{spec.name}-reader", daemon=True)
        self.reader.start()

    def post(self, method: str, *args: Any) -> None:
        with self.lock:
            self._send(Call(None, method, args))

    def ask(self, method: str, *args: Any) -> Any:
        """The answer to a call; EngineDead if the engine says nothing for too long before it comes, and it is killed then."""
        answer = self.call(method, *args)
        limit_s = patience_s(self.spec.stall_s, self.spec.max_model_len or 0)
        called = time.monotonic()
        while True:
            left_s = max(called, self.heard) + limit_s - time.monotonic()
            if left_s <= 0:
                self.silent = f"it did not answer `{method}` for {limit_s:.0f} s"
                self._kill()
                return answer.result()  # raises: the reader is about to see the end
            with suppress(TimeoutError):
                return answer.result(left_s)

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
        self.outbox.put(call)

    def _write(self) -> None:
        with suppress(OSError):  # the reader sees the same end, and learns more of it
            while (call := self.outbox.get()) is not None:
                self.pipe.send(call)

    def _read(self) -> None:
        error = ""
        try:
            with suppress(EOFError, OSError):  # an end within a message is a plain OSError
                while True:
                    said = self.pipe.recv()
                    self.heard = time.monotonic()
                    match said:
                        case Sampled() as sampled:
                            for completion in sampled.completions():
                                self.mailbox.put(Finished(self.spec.name, completion))
                        case Health() as health:
                            self.mailbox.put(Pulse(self.spec.name, health))
                        case Answer(number, value):
                            self.waiting.pop(number).set_result(value)
                        case Ready():
                            self.ready.set_result(None)
                        case Failed(error):
                            pass
        except BaseException as broken:
            error = f"what it sent could not be read: {broken!r}"
            raise
        finally:  # whatever ended the reader, whoever waits for this engine is told
            self._ended(error)

    def _ended(self, error: str) -> None:
        """The pipe broke: the process is gone or about to be, and whoever waits for it is told why."""
        self._kill()
        self.process.join()
        code = self.process.exitcode
        # -9 after an error is its own doing; without one, someone else's: often the kernel's, out of memory.
        how = self.silent or error or (f"killed by {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}")
        reason = f"{how}\n{log_tail(self.spec.log_path)}"
        with self.lock:
            self.reason = f"engine {self.spec.name} is gone: {reason}"
            self.outbox.put(None)
            started = self.ready.done()
            waiting = list(self.waiting.values()) + ([] if started else [self.ready])
        self.writer.join()
        self.pipe.close()
        if started and not self.closed:
            self.mailbox.put(Died(self.spec.name, reason))
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
    with suppress(OSError):  # a container may not allow it
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))
    with spec.log_path.open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    engine = os.pidfd_open(os.getpid())
    if os.fork() == 0:
        _guard(pipe, engine)
    # The fork server has imported it already; the trainer must not.
    from rl.engines.vllm_worker import serve

    serve(pipe, spec)


def _guard(pipe: Connection, engine: int) -> None:
    """A process that does nothing but end the whole session, itself too, when the trainer or the engine's first process is gone.

    Nobody else would: a process that hangs does not see that its pipe has ended, and vLLM's engine core outlives one that was killed.
    """
    gone = select.poll()
    gone.register(pipe.fileno(), 0)  # of the trainer's end nothing but that it was closed
    gone.register(engine, select.POLLIN)
    gone.poll()
    os.killpg(0, signal.SIGKILL)


def log_tail(path: Path) -> str:
    """The last lines of an engine's log, indented, under its path."""
    try:
        with path.open(errors="replace") as log:
            lines = deque(log, maxlen=LOG_LINES)
    except OSError as error:  # somebody removed it: whoever waits for the engine has to hear of its death all the same
        return f"its log {path} cannot be read: {error.strerror}\n"
    return f"last lines of {path}:\n" + "".join(f"  {line.rstrip()}\n" for line in lines)

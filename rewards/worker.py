"""The worker process: calls reward functions for a trainer that does not trust them to return.

Requests come as JSON lines on one private pipe, replies go as JSON lines on another; nothing is pickled, and what a function prints
goes to the worker's log. A reply carries its request's id. Functions run in the main thread, one call at a time, as math-verify's
own time limit needs it; calls of async ones run beside them and each other, on one event loop in a thread that lives as long as the
process. The process dies with its trainer, even by kill -9 and in the middle of a call.
"""

import asyncio
import copy
import ctypes
import faulthandler
import importlib
import importlib.util
import inspect
import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any

_PR_SET_PDEATHSIG = 1


def main(trainer: int, requests_fd: int, replies_fd: int) -> None:
    """Serves requests until their pipe ends; `trainer` is the process id to die with."""
    _die_with(trainer)
    faulthandler.enable()  # a crash in C and a hang (SIGUSR1, from the trainer) leave their stack in the log
    faulthandler.register(signal.SIGUSR1)
    with open(requests_fd, encoding="utf-8") as requests, open(replies_fd, "w", encoding="utf-8") as replies:
        writing = threading.Lock()

        def send(reply: dict[str, Any]) -> None:
            line = json.dumps(reply) + "\n"
            with writing:
                replies.write(line)
                replies.flush()

        worker: Worker | None = None
        for line in requests:
            request = json.loads(line)
            if worker is None:
                _limit_memory(request["memory_mb"])
                worker, reply = _loaded(request["functions"])
                send(reply)
            else:
                worker.call(request, send)


class Worker:
    """The loaded functions, and the loop of the async ones."""

    def __init__(self, functions: dict[str, Callable[..., Any]], options: dict[str, dict[str, Any]]) -> None:
        self._functions = functions
        self._options = options
        self._loop: asyncio.AbstractEventLoop | None = None

    def call(self, request: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> None:
        """One call; its reply is the values, or what the function raised. That of an async function is sent when it is done."""
        name, notes, began = request["function"], _Notes(len(request["completions"])), time.monotonic()
        try:
            arguments = {**_arguments(request, notes), **self._options[name]}
            returned = self._functions[name](**arguments)
            if not inspect.isawaitable(returned):
                send(_reply(request, returned, notes, began))
                return
        except Exception as error:  # noqa: BLE001 - a failure of the function is data: it becomes a failed Score
            send(_failed(request, error))
            return
        asyncio.run_coroutine_threadsafe(_finish(returned, request, notes, began, send), self._running_loop())

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="async functions", daemon=True).start()
        return self._loop


async def _finish(
    returned: Awaitable[Any], request: dict[str, Any], notes: "_Notes", began: float, send: Callable[[dict[str, Any]], None]
) -> None:
    try:
        reply = _reply(request, await returned, notes, began)
    except Exception as error:  # noqa: BLE001 - as above
        reply = _failed(request, error)
    send(reply)


def _reply(request: dict[str, Any], returned: Any, notes: "_Notes", began: float) -> dict[str, Any]:
    if isinstance(returned, str) or not isinstance(returned, Iterable):
        raise TypeError(f"returned {returned!r:.60}; wanted is a list with a value for each completion")
    values = [_value(item) for item in returned]
    seconds = time.monotonic() - began
    return {"id": request["id"], "values": values, "metrics": notes.metrics, "extras": notes.extras, "seconds": seconds}


def _failed(request: dict[str, Any], error: Exception) -> dict[str, Any]:
    trace = "".join(traceback.format_exception(error, limit=-20))
    return {"id": request["id"], "error": _raised(error), "traceback": trace}


class _Notes:
    """What a function logs during one call, with trl's meaning."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.metrics: list[tuple[str, float]] = []
        self.extras: dict[str, list[Any]] = {}

    def log_extra(self, column: str, values: list[Any]) -> None:
        """A column for the table of completions, one value for each completion of the call."""
        if len(values) != self._count:
            raise ValueError(f"log_extra('{column}') got {len(values)} values for {self._count} completions")
        self.extras[column] = [v if isinstance(v, str | int | float | bool | None) else str(v) for v in values]

    def log_metric(self, name: str, value: float) -> None:
        """A number that is averaged over the step."""
        self.metrics.append((name, float(value)))


def _arguments(request: dict[str, Any], notes: _Notes) -> dict[str, Any]:
    """The keyword arguments of trl's contract: one value for each completion, and what is there once."""
    texts = request["completions"]
    chat = isinstance(request["prompt"], list)
    # Copies, because a function may change the messages that it gets.
    once = {
        **request["columns"],
        "prompts": request["prompt"],
        "prompt_texts": request["prompt_text"],
        "group_ids": request["group_id"],
    }
    arguments = {name: [copy.deepcopy(value) for _ in texts] for name, value in once.items()} | {
        "completions": [[{"role": "assistant", "content": text}] for text in texts] if chat else texts,
        "completion_ids": request["completion_ids"],
        "trainer_state": SimpleNamespace(global_step=request["global_step"]),
        "log_extra": notes.log_extra,
        "log_metric": notes.log_metric,
    }
    if "completion_masks" in request:  # a tool wrote some of it
        arguments["completion_masks"] = request["completion_masks"]
    return arguments


def _value(item: Any) -> float | dict[str, str] | None:
    """A returned value as JSON can carry it; numbers of numpy and torch are numbers, text is not. An exception fails its
    completion.
    """
    if item is None:
        return None
    if isinstance(item, Exception):
        return {"failed": " ".join(f"{type(item).__name__}: {item}".split())[:300]}
    try:
        if isinstance(item, str | bytes):
            raise TypeError
        return float(item)
    except (TypeError, ValueError):
        return {"bad": f"{item!r:.80}"}


def _raised(error: Exception) -> str:
    """One line: what was raised, and where."""
    frames = traceback.extract_tb(error.__traceback__)
    said = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{said[:300]} ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})"


def _loaded(functions: list[dict[str, Any]]) -> tuple[Worker, dict[str, Any]]:
    """Imports the functions; the reply says what each names of its arguments, or which one cannot be used and why."""
    found, named, said = {}, {}, []
    for wanted in functions:
        name = wanted["name"]
        try:
            found[name] = import_function(wanted["source"], wanted["function"])
            parameters = inspect.signature(found[name]).parameters.values()
            if wanted["prepares"]:
                said.append(import_function(wanted["source"], "prepare")(**wanted["options"]))
        except Exception as error:  # noqa: BLE001 - whatever its module raises is what the user must see
            return Worker({}, {}), {"failed": name, "error": _raised(error), "traceback": traceback.format_exc()}
        named[name] = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
        unfit = ""
        if len(named[name]) == len(parameters):
            unfit = f"takes no **kwargs; the contract is {name}(prompts, completions, completion_ids, **columns)"
        for option in set(wanted["options"]) - set(named[name]):
            unfit = f"has no parameter '{option}' for the option of that name"
        if unfit:
            return Worker({}, {}), {"failed": name, "error": unfit, "traceback": ""}
    waiting = [name for name, function in found.items() if inspect.iscoroutinefunction(function)]
    return Worker(found, {wanted["name"]: wanted["options"] for wanted in functions}), {
        "named": named,
        "async": waiting,
        "said": list(filter(None, said)),
    }


def import_function(source: str, function: str) -> Any:
    """Imports a function from outside. What its module raises is not caught."""
    if not source.endswith(".py"):
        return getattr(importlib.import_module(source), function)
    path = Path(source).resolve()
    # As when the file is run: what lies beside it can be imported. At the end, so that it hides nothing.
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    name = f"reward_plugin_{path.stem}"
    if name not in sys.modules or sys.modules[name].__file__ != str(path):
        spec = importlib.util.spec_from_file_location(name, path, loader=_AsItStands(name, str(path)))
        assert spec is not None and spec.loader is not None, path
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses and pickle look a class's module up here
        spec.loader.exec_module(module)
    return getattr(sys.modules[name], function)


class _AsItStands(SourceFileLoader):
    """Compiles a file anew: Python's cache takes one that was edited within a second, and kept its size, for what it was."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def _die_with(trainer: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != trainer:
        os._exit(1)  # it died before the line above


def _limit_memory(limit_mb: int) -> None:
    if limit_mb and sys.platform == "linux":
        # RLIMIT_DATA counts what is written, not what is only reserved, of which CUDA takes a terabyte.
        resource.setrlimit(resource.RLIMIT_DATA, (limit_mb << 20, limit_mb << 20))

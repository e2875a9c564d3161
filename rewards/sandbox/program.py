"""What runs inside: a program as `__main__`, one call of it, calls on request, the asserts about it, or a command.

A job's kinds are `script` (reads stdin, writes stdout), `call` (one function, its value is the result), `serve` (answers the calls
of its asserts), `asserts` (trusted text about a program in another process) and `command`. Where model text runs, nothing is there
that it could use: a forged result is a value like any other, and what is expected of it is in another process.
"""

import atexit
import builtins
import json
import operator
import os
import resource
import stat
import sys
import threading
import traceback
import types
from collections.abc import Callable
from typing import Any, NoReturn

from rewards.sandbox.asserts import helpers, rewritten, uncarried
from rewards.sandbox.proxies import ARITHMETIC, ORDER, NotCarried, Program, ProgramEnded, Refused, modules, plain_names, said
from rewards.sandbox.values import STANDARD, Handle, Link, NotPlain, decode, encode

RESULT_FD, CHANNEL_FD = 4, 5
_PLAIN = (types.NoneType, bool, int, float, str, complex, bytes, bytearray, dict, list, tuple, set, frozenset)
OPERATIONS: dict[str, Callable[..., Any]] = {
    name: getattr(operator, f"__{name}__")
    for name in (
        *ARITHMETIC,
        *(f"i{name}" for name in ARITHMETIC),
        *ORDER,
        "neg",
        "pos",
        "invert",
        "getitem",
        "setitem",
        "delitem",
    )
}
"""What the asserts may ask for of objects that stay in the program."""
OPERATIONS |= {
    function.__name__: function
    for function in (len, iter, reversed, str, repr, int, float, abs, round, format, setattr, delattr, type, isinstance, issubclass)
}
OPERATIONS["has_equality"] = lambda value: type(value).__eq__ is not object.__eq__


def run(job: dict[str, Any]) -> NoReturn:
    """Runs a job and ends the process."""
    kind = job["kind"]
    if kind == "command":
        _run_command(job)
    if kind == "asserts":
        _write_result(job, _check(job, Program(Link(CHANNEL_FD))))
        os._exit(0)
    code = 0
    try:
        module = _load(job["source"])
        if kind == "call":
            value = _find(module, job["function"])(*decode(job["args"]))
            _write_result(job, {"value": encode(value)})
        elif kind == "serve":
            _serve(module, Link(CHANNEL_FD), job["nonce"])
    except SystemExit as stop:
        code = _exit_code(stop)
    except BaseException as error:  # noqa: BLE001 - as the interpreter does: print it and end with 1
        _print_error(error)
        code = 1
    _end(code)


def _load(source: str) -> types.ModuleType:
    """Runs a program as the main module, from a file, which multiprocessing and tracebacks look for."""
    path = os.path.join(os.getcwd(), "program.py")
    with open(path, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(source)
    module = types.ModuleType("__main__")
    module.__file__ = path
    sys.modules["__main__"] = module
    sys.argv = [path]
    sys.path.insert(0, os.getcwd())
    exec(compile(source, path, "exec", dont_inherit=True), module.__dict__)
    return module


def _find(module: types.ModuleType, name: str) -> Callable[..., Any]:
    """A function, or a method of `Solution`, as many problem sets have it."""
    defined = vars(module)
    if name in defined or "Solution" not in defined:
        return defined[name]
    return getattr(defined["Solution"](), name)


def _serve(module: types.ModuleType, link: Link, nonce: str) -> None:
    """Answers calls until the asserts are done; what is not plain stays here under a number."""
    held: list[Any] = []
    numbers: dict[int, int] = {}
    flattened = False

    def hold(value: Any) -> int | None:
        nonlocal flattened
        if isinstance(value, _PLAIN):
            flattened = flattened or type(value) not in _PLAIN
            return None
        if type(value) in STANDARD or (type(value).__module__ == "numpy" and getattr(value, "shape", None) == ()):
            return None
        if id(value) not in numbers:
            numbers[id(value)] = len(held)
            held.append(value)
        return numbers[id(value)]

    def answer(request: dict[str, Any]) -> Any:
        if "names" in request:
            defined = vars(module)
            found = {name: defined[name] for name in request["names"] if name in defined}
            return {name: encode(value, hold) for name, value in found.items()}
        if "do" in request:
            return encode(OPERATIONS[request["do"]](*decode(request["args"], held.__getitem__)), hold)
        target = held[request["of"]]
        if "get" in request:
            return encode(getattr(target, request["get"]), hold)
        if "next" in request:
            return _take(target, request["next"], hold)
        arguments = decode(request["args"], held.__getitem__)
        return encode(target(*arguments, **decode(request["kwargs"], held.__getitem__)), hold)

    while True:
        try:
            request = link.receive()
        except EOFError:
            os._exit(0)
        try:
            reply: dict[str, Any] = {"value": answer(request), "flattened": flattened}
        except NotPlain as error:
            reply = {"uncarried": f"{error}"}
        except Exception as error:  # noqa: BLE001 - what it raises is for its asserts to judge
            reply = {"raised": _raised(error)}
        about = {"nonce": nonce, "id": request["id"]}
        try:
            link.send(reply | about)
        except NotPlain as error:
            link.send({"uncarried": f"{error}"} | about)


def _take(iterator: Any, count: int, hold: Handle) -> dict[str, Any]:
    """Up to `count` items of an iterator, and how it ended if it did: `stop`, or what it raised."""
    items: list[Any] = []
    end: Any = None
    if not isinstance(type(iterator).__next__, types.WrapperDescriptorType):
        count = 1  # a class of its own: what else its object says must be as of the last item taken
    try:
        while len(items) < count:
            items.append(next(iterator))
    except StopIteration:
        end = "stop"
    except Exception as error:  # noqa: BLE001 - what it raises is for its asserts to judge
        end = _raised(error)
    return {"items": encode(items, hold), "end": end}


def _raised(error: Exception) -> list[str]:
    """Its class, the nearest class of that which every Python has, and what it says."""
    builtin = next(kind for kind in type(error).__mro__ if kind.__module__ == "builtins")
    return [type(error).__name__, builtin.__name__, f"{error}"[:1000]]


def _check(job: dict[str, Any], program: Program) -> dict[str, Any]:
    """Runs the asserts; the result says that they passed, or how they did not."""
    passed = 0

    def count() -> None:
        nonlocal passed
        passed += 1

    text = job["text"]
    try:
        code = rewritten(text, job["names"])
        names: dict[str, Any] = {"__name__": "asserts", "__builtins__": builtins, **helpers(count, program)}
        program.expect(job["nonce"])
        names |= modules(text, job["names"]) | program.names(plain_names(text, job["names"]))
        exec(code, names)
    except AssertionError as error:
        return {"verdict": "wrong", "said": f"{_line(error, text)}{f' ({said(error)})' if said(error) else ''}"}
    except ProgramEnded:
        return {"verdict": "ended", "said": "it ended before its asserts did"}
    except Refused as error:
        return {"verdict": "unfit", "said": str(error)}
    except NotCarried as error:
        return {"verdict": "unscored", "said": f"{error} at {_line(error, text)}"}
    except NotPlain as error:
        return {"verdict": "crashed", "said": f"{error}"}
    except Exception as error:  # noqa: BLE001 - raised by the program or by the text about it; either way it is no pass
        verdict = "unscored" if uncarried(error, program) else "crashed"
        return {"verdict": verdict, "said": f"{type(error).__name__}: {said(error)} at {_line(error, text)}"[:500]}
    return {"verdict": "passed", "asserts": passed}


def _line(error: BaseException, text: str) -> str:
    """The line of the asserts where it was raised, the innermost."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "asserts"]
    return f"line {lines[-1]}: {text.splitlines()[lines[-1] - 1].strip()[:200]}" if lines and lines[-1] else "the asserts"


def _run_command(job: dict[str, Any]) -> NoReturn:
    """Becomes the command; or waits for it, where files that it leaves are wanted."""
    for name, content in job["beside"].items():
        with open(name, "wb") as made:
            made.write(bytes.fromhex(content))
    with open(job["file"], "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(job["source"])
    pid = os.fork() if job["keep"] else 0
    if pid:
        _, status = os.waitpid(pid, 0)
        found = {name: _small_file(name) for name in job["keep"]}
        _write_result(job, {"files": {name: content.hex() for name, content in found.items() if content is not None}})
        code = os.waitstatus_to_exitcode(status)
        os._exit(code if code >= 0 else 128 - code)
    os.closerange(3, 1024)
    try:
        os.execvp(job["argv"][0], job["argv"])
    except OSError as error:
        print(f"{job['argv'][0]}: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(127)


def _small_file(name: str) -> bytes | None:
    """What a regular file holds; None for anything else, and for more than a result can carry."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    about = os.fstat(fd)
    if not stat.S_ISREG(about.st_mode) or about.st_size >= resource.getrlimit(resource.RLIMIT_FSIZE)[0] // 4:
        return None
    with open(fd, "rb") as file:
        return file.read()


def _write_result(job: dict[str, Any], result: dict[str, Any]) -> None:
    body = json.dumps(result | {"nonce": job["nonce"]}).encode()
    with open(RESULT_FD, "wb", closefd=False) as file:
        file.write(body)


def _exit_code(stop: SystemExit) -> int:
    if stop.code is None or isinstance(stop.code, int):
        return int(stop.code or 0) & 0xFF
    print(stop.code, file=sys.stderr)
    return 1


def _print_error(error: BaseException) -> None:
    """The traceback, without the frames of this file."""
    trace = error.__traceback__
    while trace and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    try:
        traceback.print_exception(type(error), error, trace)
    except BaseException:  # noqa: BLE001 - its __str__ may raise anything; the exit code says enough
        pass


def _end(code: int) -> NoReturn:
    """Ends as an interpreter does: other threads, exit functions, buffers; then at once."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except BaseException as error:  # noqa: BLE001 - a full disk, a closed stream, an exit function that raises
        _print_error(error)
        code = code or 1
    os._exit(code)

"""What it costs that an engine is behind HTTP: a weight update of 1 GB against a plain copy of it, and a call against none.

    python tests/bench/servers.py [--gigabytes 1.0] [--turns 5] [--calls 500]

The server is a process of its own on this machine with an engine that does nothing, so what is timed is the way there: the learner's
weight file through a socket into the server's. A real network adds its own rate. CPU seconds are those of both processes together.
"""

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

import psutil
import torch
from harness import line, table

from rl.engines.base import Engine, Health, Mailbox, Request, WeightChunk
from rl.engines.host import Host
from rl.engines.http_client import HttpTransport
from rl.engines.http_server import bind
from rl.engines.remote import Fleet, RemoteEngine
from rl.engines.weights import TensorSpec
from rl.engines.wire import Hello
from rl.sync import WeightSync

MANIFEST_MB = 16


class Nothing:
    """An engine that does nothing, at once."""

    name, slots, whole_groups = "nothing", 8, False

    def start(self, mailbox: Mailbox) -> None: ...

    def submit(self, requests: Sequence[Request]) -> None: ...

    def abort(self, ids: Sequence[str]) -> None: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def begin_update(self, version: int) -> None: ...

    def load(self, chunk: WeightChunk) -> None: ...

    def end_update(self) -> None: ...

    def sleep(self) -> None: ...

    def wake(self, part: str) -> None: ...

    def health(self) -> Health:
        return Health(True, 0, 0, 0, 0.0)

    def last_words(self) -> str:
        return ""

    def close(self) -> None: ...


class Export:
    """The learner, as far as an update goes: tensors of 16 MB."""

    def __init__(self, gigabytes: float) -> None:
        count = max(1, round(gigabytes * 1000 / MANIFEST_MB))
        self.tensors = {f"tensor.{n}": torch.randn(MANIFEST_MB * 250_000) for n in range(count)}

    def export(self) -> Any:
        return iter(self.tensors.items())


def server(pipe: Connection) -> None:
    engine: Engine = Nothing()  # type: ignore[assignment]
    http = bind("127.0.0.1", 0, None)
    http.serve(Host(engine, {}, {}, None))
    pipe.send(http.url)
    pipe.recv()


def cpu_s(pid: int) -> float:
    return sum(sum(psutil.Process(one).cpu_times()[:2]) for one in (pid, os.getpid()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--calls", type=int, default=500)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    process = context.Process(target=server, args=(other,), daemon=True)
    process.start()
    learner = Export(arguments.gigabytes)
    manifest = {name: TensorSpec("float32", tuple(tensor.shape)) for name, tensor in learner.export()}
    hello = Hello("bench", "a benchmark", {}, 1, manifest)
    engine = RemoteEngine("engine-0", HttpTransport(pipe.recv(), None), hello, Fleet(1), slots=8, whole_groups=False)
    engine.start(SimpleQueue())
    sync = WeightSync([engine], manifest)
    copies = {name: torch.zeros_like(tensor) for name, tensor in learner.export()}
    rows = []
    for turn in range(arguments.turns + 1):
        began, cpu = time.perf_counter(), cpu_s(process.pid or 0)
        for name, tensor in learner.export():
            copies[name].copy_(tensor)
        copied, copied_cpu = time.perf_counter() - began, cpu_s(process.pid or 0) - cpu
        cpu = cpu_s(process.pid or 0)
        sync.push(learner, turn + 1)
        assert sync.stats is not None
        used, stats = cpu_s(process.pid or 0) - cpu, sync.stats
        rows.append(
            {
                "turn": turn,
                "gigabytes": round(stats.bytes / 1e9, 3),
                "copy_s": round(copied, 3),
                "write_s": round(stats.write_s, 3),
                "http_s": round(stats.bring_s + stats.load_s, 3),
                "copy_cpu_s": round(copied_cpu, 2),
                "push_cpu_s": round(used, 2),
            }
        )
        line(rows[-1])
    table(rows, tuple(rows[0]))
    took = []
    for _ in range(arguments.calls):
        began = time.perf_counter()
        engine.health()
        took.append(time.perf_counter() - began)
    print(f"\na call: median {1e3 * statistics.median(took):.2f} ms, 99 % under {1e3 * statistics.quantiles(took, n=100)[98]:.2f} ms")
    ratio = statistics.median(row["push_cpu_s"] / max(row["copy_cpu_s"], 0.01) for row in rows[1:])
    print(f"CPU of an update, write and way, over that of a copy: {ratio:.2f} (median after the first turn)")
    engine.close()
    sync.close()
    pipe.send(None)
    process.join()


if __name__ == "__main__":
    main()

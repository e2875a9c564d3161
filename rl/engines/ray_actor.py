"""Engines on a Ray cluster (`rollout.placement: ray`): each a host in an actor, wherever Ray finds room for it.

The cluster is the one that RAY_ADDRESS names, or one of this machine alone, which ends with the run and listens on the loopback
interface, whoever imported ray before. An actor is a life: Ray does not restart one, the pool asks for the
next. A chunk of weights is put into Ray's object store once for all engines; Ray brings it to each node once. Nodes need this checkout's
packages and the policy under the same path, or its hub id, which is checked like all that a server and its learner have in common.

An engine of more GPUs than a node has is vLLM's own business: its actor takes no GPU, vLLM spreads its workers over the cluster, and
weights reach those by vLLM's own calls. That, and everything here on a GPU, has not run.
"""

import os
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray._private import ray_constants
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from data.recipe import InputError
from rl.config import PolicyConfig, RolloutConfig
from rl.engines.base import EngineDead, Event, WeightChunk
from rl.engines.host import Host
from rl.engines.server import Answer, Call, Failed, Ready
from rl.engines.weights import chunk_bytes
from rl.engines.wire import Broken, Hello, Welcome

POLL_s = 5.0
"""Events are waited for so long; then the answer is that there are none."""
ROOM_s = 300.0
"""How long the cluster may take to find room for an actor and start its process."""
SILENT_s = 60.0
"""An actor that owes an answer for so long after it was due is gone; Ray says so earlier where its process or node died."""

END_s = 6.0
"""How long an actor may take to end its engine and remove its files, before it is killed."""


class HostActor:
    """What runs on the cluster."""

    def __init__(
        self, rollout: RolloutConfig, policy: PolicyConfig, max_model_len: int, threads: int, returns_routes: bool, over_nodes: bool
    ) -> None:
        self.work = tempfile.TemporaryDirectory(prefix="cohort-ray-")
        self.settings = (rollout, policy, max_model_len, Path(self.work.name))
        self.returns_routes = returns_routes
        self.over_nodes = over_nodes
        self.threads = threads
        self.host: Host | None = None
        self.making = threading.Lock()

    def connect(self, hello: Hello) -> Welcome:
        from rl.engines.make import make_host  # which imports this module where an engine is asked for

        with self.making:
            if self.host is None:
                torch.set_num_threads(self.threads)
                # vLLM, over nodes, finds the cluster by it.
                os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
                self.host = make_host(*self.settings, returns_routes=self.returns_routes, over_nodes=self.over_nodes)
        return self.host.connect(hello)

    def calls(self, session: str, number: int, calls: Sequence[Call]) -> list[Answer | Broken]:
        return self._host().calls(session, number, calls)

    def events(self, session: str, after: int) -> list[Event | Ready | Failed]:
        return self._host().events(session, after, POLL_s)

    def weights(self, session: str, slots: Sequence[Any], data: np.ndarray) -> None:
        with self._host().stage(session, slots) as rooms:
            at = 0
            for room in rooms:
                room[:] = data[at : at + len(room)].data
                at += len(room)

    def pid(self) -> int:
        return os.getpid()

    def end(self) -> None:
        if self.host is not None:
            self.host.close()
        self.work.cleanup()

    def _host(self) -> Host:
        assert self.host is not None, "no learner has said hello"
        return self.host


class Shelf:
    """Weights in Ray's object store: a chunk of a version is put there once, for all engines that are sent it."""

    def __init__(self) -> None:
        self.version = -1
        self.chunks: dict[int, Any] = {}
        self.lock = threading.Lock()

    def put(self, chunk: WeightChunk, version: int) -> Any:
        with self.lock:
            if version != self.version:
                self.version, self.chunks = version, {}  # engines that still read older ones hold references of their own
            first = chunk.slots[0].offset
            if first not in self.chunks:
                self.chunks[first] = ray.put(np.frombuffer(chunk_bytes(chunk), np.uint8))
            return self.chunks[first]


class RayTransport:
    """Implements `rl.engines.remote.Transport`: a life of the engine is an actor."""

    def __init__(self, kind: Any, settings: tuple[Any, ...], shelf: Shelf) -> None:
        """kind: the actor's class with what it needs of the cluster; settings: HostActor's."""
        self.kind = kind
        self.settings = settings
        self.shelf = shelf
        self.where = "an actor on Ray"
        self.actor: Any = None

    def connect(self, hello: Hello) -> Welcome:
        self._end()
        self.actor = self.kind.remote(*self.settings)
        try:
            ray.get(self.actor.__ray_ready__.remote(), timeout=ROOM_s)
        except GetTimeoutError:
            self._end()
            raise EngineDead(f"no room on the Ray cluster for an engine in {ROOM_s:.0f} s; free: {ray.available_resources()}") from None
        except RayError as error:
            raise EngineDead(f"the actor could not be started: {_first_line(error)}") from None
        return self._get(self.actor.connect.remote(hello), None)

    def calls(self, session: str, number: int, calls: Sequence[Call]) -> list[Answer | Broken]:
        return self._get(self._there().calls.remote(session, number, list(calls)), None)

    def events(self, session: str, after: int) -> list[Event | Ready | Failed]:
        return self._get(self._there().events.remote(session, after), POLL_s + SILENT_s)

    def weights(self, session: str, chunk: WeightChunk, version: int) -> None:
        self._get(self._there().weights.remote(session, list(chunk.slots), self.shelf.put(chunk, version)), None)

    def leave(self, session: str) -> None:
        if self.actor is not None:
            with suppress(RayError, GetTimeoutError):
                ray.get(self.actor.end.remote(), timeout=END_s)
        self._end()

    def _there(self) -> Any:
        actor = self.actor  # another thread may end it
        if actor is None:
            raise EngineDead(f"{self.where} has ended")
        return actor

    def _end(self) -> None:
        actor, self.actor = self.actor, None
        if actor is not None:
            ray.kill(actor)  # its engine's process ends with it

    def _get(self, answer: Any, timeout_s: float | None) -> Any:
        try:
            return ray.get(answer, timeout=timeout_s)
        except GetTimeoutError:
            raise EngineDead(f"{self.where} does not answer") from None
        except RayTaskError as error:
            if isinstance(error.cause, EngineDead | InputError):
                raise error.cause from None
            raise EngineDead(f"{self.where}: {error.cause!r}") from None
        except RayError as error:
            raise EngineDead(f"{self.where} is gone: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def ray_transports(rollout: RolloutConfig, policy: PolicyConfig, max_model_len: int, *, returns_routes: bool) -> list[RayTransport]:
    """One for each engine, on the cluster of RAY_ADDRESS or a new one of this machine. InputError if it is too small."""
    _connect(rollout)
    gpus = [node["Resources"].get("GPU", 0.0) for node in ray.nodes() if node["Alive"]]
    each = (rollout.tensor_parallel if rollout.engine == "vllm" else 1) if any(gpus) else 0
    over_nodes = each > max(gpus)
    total = ray.cluster_resources()
    for name, count in (("CPU", rollout.engines), ("GPU", rollout.engines * each)):
        has = total.get(name, 0.0)
        if has < count:
            raise InputError(
                f"rollout.placement: {rollout.engines} engines need {count} {name}s of the Ray cluster, and it has {has:g}; "
                "lower rollout.engines or rollout.tensor_parallel, or start Ray on more machines"
            )
    # One thread asks for events all the time, one calls, one brings weights.
    kind = ray.remote(num_cpus=1, num_gpus=0 if over_nodes else each, max_concurrency=4, max_restarts=0)(HostActor)
    shelf = Shelf()
    settings = (rollout, policy, max_model_len, torch.get_num_threads(), returns_routes, over_nodes)
    return [RayTransport(kind, settings, shelf) for _ in range(rollout.engines)]


def _connect(rollout: RolloutConfig) -> None:
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if "RAY_ADDRESS" in os.environ:
        try:
            ray.init(**quiet)
        except ConnectionError as error:
            raise InputError(f"RAY_ADDRESS: no Ray cluster at {os.environ['RAY_ADDRESS']}: {_first_line(error)}") from None
        return
    # Ray's own switch, without which a cluster of one machine listens on all interfaces that there are. Its processes read the variable;
    # this one did when ray was imported, which vllm may have done.
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    if torch.cuda.is_available():
        raise InputError(
            "rollout.placement: ray without RAY_ADDRESS is a cluster of this machine, whose GPUs the learner takes; start Ray where the "
            "engines are to be and set RAY_ADDRESS, or take split"
        )
    own = {"num_cpus": max(rollout.engines, os.cpu_count() or 1), "include_dashboard": False}
    try:
        ray.init(address="local", **own, **quiet)
    except Exception as error:  # Ray has no kind of its own for a start that takes it longer than its 30 s
        ray.shutdown()
        raise EngineDead(f"Ray could not be started on this machine: {_first_line(error)}") from error

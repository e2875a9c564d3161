"""Ranks of one run: rank 0 samples, scores and writes; all ranks learn.

Rank 0 hands finished groups to the others as plain tensors and a header in JSON; nothing is pickled, because completions are what a
model wrote. What goes wrong on rank 0 reaches the others as an error too, so that none of them waits for a broadcast that never
comes. With one rank every call is the identity.
"""

import json
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState

from data.values import Completion, Group, Prompt, Score

ARRAYS = {"token_ids": np.int32, "mask": np.uint8, "engine_logp": np.float32, "policy_version": np.int32}


class RankZeroFailed(RuntimeError):
    """Rank 0 stopped; the message is its reason."""


class Ranks:
    """This process among its fellows, on accelerate's PartialState."""

    def __init__(self) -> None:
        # The others wait while rank 0 samples and evaluates, which may take hours; the default of ten minutes would end them.
        waits = {"timeout": timedelta(days=1)} if "WORLD_SIZE" in os.environ else {}
        self.state = PartialState(cpu=not torch.cuda.is_available(), **waits)
        self.rank: int = self.state.process_index
        self.count: int = self.state.num_processes
        self.device: torch.device = self.state.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def groups(self, make: Callable[[], Sequence[Group]]) -> list[Group]:
        """Calls `make` on rank 0 and returns its groups on all; columns and texts stay on rank 0."""
        if self.count == 1:
            return list(make())
        payload: tuple[bytes, list[np.ndarray]] | None = None
        groups: list[Group] = []
        failure: BaseException | None = None
        if self.main:
            try:
                groups = list(make())
                payload = encode_groups(groups)
            except BaseException as error:  # noqa: BLE001 -- whatever ends rank 0 has to end the others
                failure = error
                payload = json.dumps({"failed": f"{type(error).__name__}: {error}"}).encode(), []
        header, flat = self._broadcast(payload)
        if failure is not None:
            raise failure
        if "failed" in header:
            raise RankZeroFailed(header["failed"])
        return groups if self.main else decode_groups(header, flat)

    def _broadcast(self, payload: tuple[bytes, list[np.ndarray]] | None) -> tuple[dict, torch.Tensor]:
        """A JSON header and one row of bytes that holds all arrays behind each other."""
        sizes = torch.zeros(2, dtype=torch.int64, device=self.device)
        body = torch.empty(0, dtype=torch.uint8)
        if payload is not None:
            arrays = b"".join(np.ascontiguousarray(array).tobytes() for array in payload[1])
            body = torch.frombuffer(bytearray(payload[0] + arrays), dtype=torch.uint8)
            sizes = torch.tensor([len(payload[0]), len(body)], dtype=torch.int64, device=self.device)
        dist.broadcast(sizes, 0)
        head, total = sizes.tolist()
        body = body.to(self.device) if payload is not None else torch.empty(total, dtype=torch.uint8, device=self.device)
        dist.broadcast(body, 0)
        body = body.cpu()
        return json.loads(bytes(body[:head].numpy())), body[head:]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in place."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def largest(self, value: float) -> float:
        """The largest of a number over ranks."""
        packed = torch.tensor(value, dtype=torch.float64, device=self.device)
        if self.count > 1:
            dist.all_reduce(packed, dist.ReduceOp.MAX)
        return packed.item()

    def from_main(self, value: int) -> int:
        """Rank 0's number, on all ranks."""
        packed = torch.tensor(value, device=self.device)
        if self.count > 1:
            dist.broadcast(packed, 0)
        return int(packed.item())

    def agree(self, flag: bool) -> bool:
        """True on all ranks if it is on any."""
        return bool(self.sum(torch.tensor([float(flag)], device=self.device)).item())

    def barrier(self) -> None:
        if self.count > 1:
            dist.barrier()

    def close(self) -> None:
        if self.count > 1 and dist.is_initialized():
            dist.destroy_process_group()


def encode_groups(groups: Sequence[Group]) -> tuple[bytes, list[np.ndarray]]:
    """What a learner needs of groups: a JSON header and the arrays in the order the header names them."""
    arrays: list[np.ndarray] = []
    rows = []
    for group in groups:
        arrays.append(group.prompt.token_ids.astype(np.int32))
        completions = []
        for c in group.completions:
            arrays += [getattr(c, name).astype(kind) for name, kind in ARRAYS.items()]
            routes = None
            if c.routes is not None and c.routes_valid is not None:
                arrays += [c.routes, c.routes_valid]
                routes = {"shape": c.routes.shape, "dtype": c.routes.dtype.name}
            completions.append([c.index, c.seed, len(c.token_ids), c.finish_reason, c.engine, routes])
        scores = [[s.value, s.status] for s in group.scores]
        rows.append([group.id, group.prompt.id, group.attempt, len(group.prompt.token_ids), completions, scores])
    return json.dumps({"groups": rows}).encode(), arrays


def decode_groups(header: dict, flat: torch.Tensor) -> list[Group]:
    buffer, place = flat.numpy(), 0

    def take(count: int, kind: np.dtype | type) -> np.ndarray:
        nonlocal place
        size = count * np.dtype(kind).itemsize
        place += size
        return np.frombuffer(buffer[place - size : place].tobytes(), dtype=kind)

    groups = []
    for gid, pid, attempt, prompt_tokens, rows, scores in header["groups"]:
        prompt = Prompt(id=pid, prompt="", text="", token_ids=take(prompt_tokens, np.int32))
        completions = []
        for index, seed, tokens, finish_reason, engine, routes in rows:
            fields: dict[str, Any] = {name: take(tokens, kind) for name, kind in ARRAYS.items()}
            if routes is not None:
                count = int(np.prod(routes["shape"]))
                fields["routes"] = take(count, np.dtype(routes["dtype"])).reshape(routes["shape"])
                fields["routes_valid"] = take(prompt_tokens + tokens, np.bool_)
            completions.append(
                Completion(
                    prompt_id=pid, group_id=gid, index=index, attempt=attempt, seed=seed, finish_reason=finish_reason,
                    engine=engine, **fields,
                )
            )  # fmt: skip
        scored = tuple(Score(value=value, status=status) for value, status in scores)
        groups.append(Group(id=gid, prompt=prompt, attempt=attempt, completions=tuple(completions), scores=scored))
    return groups

"""Weights by vLLM's nccl backend, as far as a machine without a GPU can tell: who is called, in which order, with what."""

import subprocess
import sys
from pathlib import Path

import pytest

from rl.engines.nccl import NcclSync
from rl.engines.weights import TensorSpec
from rl.ranks import Ranks

SENDER = '''
import sys
sys.path[:0] = [".", "tests"]
from pathlib import Path
import torch
from vllm.distributed.weight_transfer import nccl_engine
from rl.engines.nccl import NcclSync
from rl.engines.vllm import VllmEngine
from rl.engines.weights import TensorSpec
from rl.ranks import Ranks

calls, arrived = [], []


class Engine(VllmEngine):
    """Notes what vLLM's trainer side asks of an engine."""

    def transfer(self, method, info):
        calls.append((self.name, method, info))

    def begin_update(self, version):
        calls.append((self.name, "begin", version))

    def end_update(self):
        calls.append((self.name, "end", None))


class Learner:
    def export(self):
        yield "a", torch.arange(6.0).view(2, 3)
        yield "b", torch.ones(4, dtype=torch.bfloat16)


# In place of NCCL: the endpoint, and the broadcast of what the source gives, after vLLM's own check of it.
nccl_engine.open_trainer_endpoint = lambda info: calls.append(("trainer", info.rank, info.world_size)) or "group"
trainer = nccl_engine.NCCLTrainerWeightTransferEngine
trainer._broadcast = lambda self, source, meta: arrived.extend(self._checked_iter(source, meta))

engines = [Engine(f"engine-{n}", Path("."), log_path=Path("log"), tensor_parallel=2, weight_backend="nccl") for n in range(2)]
sync = NcclSync(engines, {"a": TensorSpec("float32", (2, 3)), "b": TensorSpec("bfloat16", (4,))}, Ranks())
sync.push(Learner(), version=7)

assert ("trainer", 0, 5) in calls
of = lambda name: [(method, info) for who, method, info in calls if who == name]
for name, offset in (("engine-0", 1), ("engine-1", 3)):
    (init, first), (begin, version), (update, second), (end, _) = of(name)
    assert (init, begin, update, end) == ("init_weight_transfer_engine", "begin", "update_weights", "end"), of(name)
    assert first["init_info"]["rank_offset"] == offset and first["init_info"]["world_size"] == 5
    assert version == 7
    assert second["update_info"] == {"names": ["a", "b"], "dtype_names": ["float32", "bfloat16"], "shapes": [[2, 3], [4]]}
assert [name for name, _ in arrived] == ["a", "b"] and torch.equal(arrived[0][1], torch.arange(6.0).view(2, 3))
assert sync.metrics()["sync/bytes"] == 6 * 4 + 4 * 2

calls.clear()
sync.push(Learner(), version=8)  # the group stays
assert [(method, info) for method, info in of("engine-1") if method == "begin"] == [("begin", 8)]
assert not any(method == "init_weight_transfer_engine" for _, method, _ in calls)
try:
    sync.replay(engines[1])
    raise SystemExit("replay went through")
except Exception as error:
    assert "engine-1" in str(error) and "rollout.weights=file" in str(error)
print("held")
'''


def test_each_engine_joins_at_its_own_rank_and_gets_every_version() -> None:
    root = Path(__file__).parent.parent.parent
    done = subprocess.run([sys.executable, "-c", SENDER], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.endswith("held\n"), done.stdout[-1500:] + done.stderr[-3000:]


def test_before_the_first_push_there_is_nothing_to_bring_back() -> None:
    sync = NcclSync((), {"a": TensorSpec("float32", (2, 3))}, Ranks())
    sync.replay(engine=None)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="no push yet"):
        sync.metrics()

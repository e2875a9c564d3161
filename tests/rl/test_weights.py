"""The weight file and WeightSync, with engines that only remember what they were sent."""

import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch
from policies import tiny_qwen3_moe
from safetensors.torch import load_file

from rl.engines.base import EngineDead, Health, Mailbox, Request, WeightChunk
from rl.engines.remote import RemoteEngine
from rl.engines.weights import TensorSpec, WeightFile, WeightMismatch, read_chunk, read_manifest
from rl.sync import WeightSync

MANIFEST = {
    "embed.weight": TensorSpec("float32", (5, 3)),
    "layers.0.experts.0.up.weight": TensorSpec("bfloat16", (4, 7)),
    "layers.0.experts.1.up.weight": TensorSpec("bfloat16", (4, 7)),
    "layers.0.scale": TensorSpec("float32", ()),
}


class TableLearner:
    """Exports a table of tensors."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.weights = weights
        self.exported = 0

    def export(self) -> Iterator[tuple[str, torch.Tensor]]:
        for item in self.weights.items():
            self.exported += 1
            yield item


class MemoryEngine:
    """Holds the weights it was sent, and what was called."""

    whole_groups = False

    def __init__(self, name: str = "memory", meet: threading.Barrier | None = None) -> None:
        self.name = name
        self.slots = 1
        self.weights: dict[str, torch.Tensor] = {}
        self.version = 0
        self.calls: list[str] = []
        self.dead = False
        self.meet = meet

    def start(self, mailbox: Mailbox) -> None:
        self.weights, self.version, self.calls, self.dead = {}, 0, [], False

    def submit(self, requests: Sequence[Request]) -> None: ...

    def abort(self, ids: Sequence[str]) -> None: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def begin_update(self, version: int) -> None:
        if self.dead:
            raise EngineDead(f"engine {self.name} is gone")
        if self.meet is not None:
            self.meet.wait(timeout=5)
        self.calls.append("begin")
        self.next_version = version

    def load(self, chunk: WeightChunk) -> None:
        self.calls.append("load")
        for name, tensor in read_chunk(chunk):
            self.weights[name] = tensor.clone()

    def end_update(self) -> None:
        self.calls.append("end")
        self.version = self.next_version

    def health(self) -> Health:
        return Health(not self.dead, 0, self.version, 0, 0.0)

    def last_words(self) -> str:
        return ""

    def close(self) -> None: ...


def random_weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(spec.shape, generator=generator).to(getattr(torch, spec.dtype)) for name, spec in MANIFEST.items()}


def assert_same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert list(got) == list(wanted)
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("chunk_bytes, chunks", [(1, 4), (100, 2), (1 << 20, 1)])
def test_what_is_read_is_what_was_written_in_chunks_of_any_size(chunk_bytes: int, chunks: int) -> None:
    file = WeightFile(MANIFEST, chunk_bytes=chunk_bytes)
    weights = random_weights(0)
    file.write(reversed(weights.items()))  # the learner's order need not be the checkpoint's
    assert len(file.chunks) == chunks
    assert_same({name: tensor for chunk in file.chunks for name, tensor in read_chunk(chunk)}, weights)
    file.close()


def test_a_receiver_that_writes_into_a_view_changes_nothing_for_others() -> None:
    file = WeightFile(MANIFEST)
    file.write(random_weights(0).items())
    for _, tensor in read_chunk(file.chunks[0]):
        tensor.zero_()
    assert_same(dict(read_chunk(file.chunks[0])), random_weights(0))
    file.close()


def test_views_are_of_the_shared_memory_itself() -> None:
    file = WeightFile(MANIFEST)
    file.write(random_weights(0).items())
    views = dict(read_chunk(file.chunks[0]))
    file.write(random_weights(1).items())
    assert_same(views, random_weights(1))
    file.close()


def broken(change: str) -> dict[str, torch.Tensor]:
    weights = random_weights(1)
    name = "layers.0.experts.1.up.weight"
    if change == "missing":
        del weights[name]
    elif change == "extra":
        weights["layers.0.experts.2.up.weight"] = weights[name]
    elif change == "shape":
        weights[name] = weights[name].T
    elif change == "dtype":
        weights[name] = weights[name].float()
    return weights


@pytest.mark.parametrize(
    "change, says",
    [
        ("missing", r"1 of 4 tensors did not come, first layers\.0\.experts\.1\.up\.weight"),
        ("extra", r"layers\.0\.experts\.2\.up\.weight is not in the policy's checkpoint"),
        ("shape", r"layers\.0\.experts\.1\.up\.weight has shape \(7, 4\), the policy's checkpoint has \(4, 7\)"),
        ("dtype", r"layers\.0\.experts\.1\.up\.weight is torch\.float32, expected torch\.bfloat16"),
    ],
)
def test_an_export_that_is_not_the_policy_reaches_no_engine(change: str, says: str) -> None:
    engine = MemoryEngine()
    sync = WeightSync([engine], MANIFEST)
    sync.push(TableLearner(random_weights(0)), version=1)
    engine.calls.clear()
    with pytest.raises(WeightMismatch, match=says):
        sync.push(TableLearner(broken(change)), version=2)
    assert engine.calls == []
    assert engine.version == 1
    assert_same(engine.weights, random_weights(0))
    sync.close()


def test_a_tensor_that_comes_twice_is_refused() -> None:
    file = WeightFile(MANIFEST)
    items = list(random_weights(0).items())
    with pytest.raises(WeightMismatch, match=r"embed\.weight came twice"):
        file.write([*items, items[0]])
    assert file.chunks == []
    file.close()


def test_a_restarted_engine_is_replayed_to_the_last_update() -> None:
    engine = MemoryEngine()
    sync = WeightSync([engine], MANIFEST)
    sync.replay(engine)
    assert engine.calls == []  # before the first update there is nothing to replay
    sync.push(TableLearner(random_weights(0)), version=1)
    sync.push(TableLearner(random_weights(1)), version=2)
    engine.start(SimpleQueue())
    sync.replay(engine)
    assert engine.calls == ["begin", "load", "end"]
    assert engine.version == 2
    assert_same(engine.weights, random_weights(1))
    sync.close()


def test_engines_are_updated_side_by_side() -> None:
    meet = threading.Barrier(3)  # breaks unless all three are in begin_update at once
    engines = [MemoryEngine(f"e{i}", meet) for i in range(3)]
    sync = WeightSync(engines, MANIFEST)
    sync.push(TableLearner(random_weights(0)), version=7)
    metrics = sync.metrics()
    assert metrics["sync/bytes"] == 64 + 64 + 64 + 64  # 60, 56, 56 and 4, each from a multiple of 64
    assert metrics["time/sync_s"] == sync.stats.write_s + sync.stats.bring_s + sync.stats.wait_s + sync.stats.load_s > 0
    for engine in engines:
        assert engine.version == 7
        assert_same(engine.weights, random_weights(0))
    sync.close()


class FarMemoryEngine(MemoryEngine, RemoteEngine):
    """On another machine: `end_update` is where the gathered update reaches what it samples from."""

    def bring(self, version: int, chunks: Sequence[WeightChunk]) -> None:
        self.begin_update(version)
        for chunk in chunks:
            self.load(chunk)


def test_an_update_crosses_to_another_machine_before_anything_stands_still() -> None:
    near, far = MemoryEngine("near"), FarMemoryEngine("far")
    sync = WeightSync([near, far], MANIFEST)
    calls: list[tuple[list[str], list[str]]] = []

    @contextmanager
    def standing_still(version: int) -> Iterator[None]:
        calls.append((near.calls[:], far.calls[:]))
        yield

    sync.standing_still = standing_still
    sync.push(TableLearner(random_weights(0)), version=1)
    assert calls == [([], ["begin", "load"])]
    assert near.calls == far.calls == ["begin", "load", "end"]
    far.start(SimpleQueue())  # another life
    sync.replay(far)
    assert far.calls == ["begin", "load", "end"] and far.version == 1
    assert_same(far.weights, random_weights(0))
    sync.close()


def test_a_dead_engine_is_passed_over_and_replayed_when_it_is_back() -> None:
    engines = [MemoryEngine("a"), MemoryEngine("b")]
    engines[0].dead = True
    sync = WeightSync(engines, MANIFEST)
    sync.push(TableLearner(random_weights(0)), version=1)
    assert (engines[0].version, engines[1].version) == (0, 1)
    engines[0].start(SimpleQueue())
    sync.replay(engines[0])
    assert engines[0].version == 1
    assert_same(engines[0].weights, random_weights(0))
    sync.close()


def test_an_engine_that_dies_in_the_middle_of_an_update_keeps_none_of_it() -> None:
    class DiesAtThirdLoad(MemoryEngine):
        def load(self, chunk: WeightChunk) -> None:
            super().load(chunk)
            if self.calls.count("load") == 3:
                self.dead = True
                raise EngineDead("engine a is gone")

    engines = [DiesAtThirdLoad("a"), MemoryEngine("b")]
    sync = WeightSync(engines, MANIFEST)
    sync.file = WeightFile(MANIFEST, chunk_bytes=1)
    sync.push(TableLearner(random_weights(0)), version=1)
    assert engines[0].calls == ["begin", "load", "load", "load"] and engines[1].version == 1
    engines[0].calls = ["load"] * 3
    engines[0].dead = False
    sync.replay(engines[0])
    assert engines[0].version == 1
    assert_same(engines[0].weights, random_weights(0))
    sync.close()


def test_an_engine_that_comes_back_in_the_middle_of_an_update_gets_it_whole() -> None:
    """Its replay waits for the push: it never sees a file that is half one update and half another."""
    back, late = threading.Event(), MemoryEngine("late")
    sync = WeightSync([], MANIFEST)
    sync.push(TableLearner(random_weights(0)), version=1)

    class SlowLearner(TableLearner):
        def export(self) -> Iterator[tuple[str, torch.Tensor]]:
            for n, item in enumerate(super().export()):
                if n == 2:
                    back.set()
                    replay.join(0.2)
                    assert replay.is_alive() and late.calls == []
                yield item

    def come_back() -> None:
        back.wait()
        sync.replay(late)

    replay = threading.Thread(target=come_back)
    replay.start()
    sync.push(SlowLearner(random_weights(1)), version=2)
    replay.join()
    assert late.version == 2
    assert_same(late.weights, random_weights(1))
    sync.close()


def test_a_rank_without_engines_takes_part_in_the_export() -> None:
    learner = TableLearner(random_weights(0))
    WeightSync().push(learner, version=1)
    assert learner.exported == 4


def test_the_manifest_is_what_the_checkpoint_holds(tmp_path: Path) -> None:
    policy = tiny_qwen3_moe(tmp_path, seed=0, dtype=torch.bfloat16)
    weights = load_file(policy / "model.safetensors")
    manifest = read_manifest(policy)
    assert {n: (s.dtype, s.shape) for n, s in manifest.items()} == {n: ("bfloat16", tuple(t.shape)) for n, t in weights.items()}
    assert read_manifest(policy, dtype="float32")["lm_head.weight"] == TensorSpec("float32", (64, 128))
    assert "model.layers.1.mlp.experts.7.down_proj.weight" in manifest


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no \*\.safetensors file; save the policy with save_pretrained"):
        read_manifest(tmp_path)


def test_no_room_is_an_error_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=100))
    with pytest.raises(ValueError, match=r"/dev/shm has 0\.00 GB.*docker: --shm-size.*TMPDIR"):
        WeightFile(MANIFEST)


def test_the_file_is_gone_with_its_sender_even_by_kill_9() -> None:
    code = (
        "import os, signal\n"
        "from rl.engines.weights import TensorSpec, WeightFile\n"
        "file = WeightFile({'w': TensorSpec('float32', (1 << 20,))})\n"
        "assert os.path.exists(file.path)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    before = set(Path("/dev/shm").iterdir())
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert {path for path in set(Path("/dev/shm").iterdir()) - before if path.name.startswith("cohort")} == set()

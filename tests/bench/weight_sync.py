"""A weight update of at least 1 GB: what the sender and the transport take, against a plain copy of the same bytes.

    python tests/bench/weight_sync.py [--layers 5] [--turns 5] [--engine]

`copy` copies every tensor of the checkpoint into memory that is there already. `write` is the sender: the learner's export into the
weight file, checked against the manifest. `transport` is what a receiver, another process, takes to have all bytes before it: it maps
the file and touches every page. With `--engine` a vLLM engine loads each update as well; its `reload` (copying into its layers and
packing them for its kernels) is stated apart. Turn by turn in the same run; the first turn, in which pages are touched for the first
time, is stated apart too.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from harness import line, table
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import policies  # isort: skip  # `harness` has put tests/ on the path
from rl.engines.vllm import VllmEngine
from rl.engines.weights import WeightFile, read_chunk, read_manifest
from rl.policy import checkpoint_views, load_model
from rl.sync import WeightSync


def make_policy(folder: Path, layers: int) -> Path:
    """Qwen3-MoE, fp32: about 0.22 GB a layer, 32 experts of width 512."""
    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=2048, moe_intermediate_size=512, num_hidden_layers=layers, num_experts=32,
        num_experts_per_tok=4, num_attention_heads=16, num_key_value_heads=4, head_dim=64, max_position_embeddings=512,
        tie_word_embeddings=False, pad_token_id=policies.PAD, eos_token_id=policies.EOS,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    policies.character_tokenizer(config.vocab_size).save_pretrained(folder)
    return folder


class Export:
    """The learner, as far as an update goes."""

    def __init__(self, policy: Path) -> None:
        self.model = load_model(policy, torch.float32)

    def export(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from checkpoint_views(self.model)


def receiver(pipe: Connection) -> None:
    """Maps the chunks and touches a byte of every page; answers with seconds."""
    torch.set_num_threads(1)
    while (chunks := pipe.recv()) is not None:
        began = time.perf_counter()
        for chunk in chunks:
            for _, tensor in read_chunk(chunk):
                tensor.view(torch.uint8).reshape(-1)[:: os.sysconf("SC_PAGESIZE")].sum()
        pipe.send(time.perf_counter() - began)


def measure(arguments: argparse.Namespace, policy: Path, folder: Path) -> list[dict[str, Any]]:
    learner = Export(policy)
    copies = {name: torch.empty_like(tensor).zero_() for name, tensor in learner.export()}
    engine = VllmEngine("engine-0", policy, log_path=folder / "engine.log", max_model_len=64, slots=4)
    if arguments.engine:
        engine.start(SimpleQueue())
    sync = WeightSync([engine] if arguments.engine else [], read_manifest(policy))
    assert isinstance(sync.file, WeightFile)
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    process = context.Process(target=receiver, args=(other,), daemon=True)
    process.start()
    rows = []
    for turn in range(arguments.turns + 1):
        began = time.perf_counter()
        for name, tensor in learner.export():
            copies[name].copy_(tensor)
        copied = time.perf_counter() - began
        sync.push(learner, version=turn + 1)
        assert sync.stats is not None
        pipe.send(sync.file.chunks)
        touched = pipe.recv()
        write_s, load_s = sync.stats.write_s, sync.stats.load_s
        row = {"turn": turn, "gigabytes": round(sync.file.bytes / 1e9, 3), "copy_s": round(copied, 3), "write_s": round(write_s, 3)}
        row |= {"transport_s": round(touched, 3), "share": round((write_s + touched) / copied, 2)}
        if arguments.engine:
            row["reload_s"] = round(load_s, 3)
        line(row)
        rows.append(row)
    pipe.send(None)
    process.join()
    engine.close()
    sync.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--engine", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(arguments, make_policy(Path(folder) / "policy", arguments.layers), Path(folder))
    table(rows, tuple(rows[0]))
    later = statistics.median(row["share"] for row in rows[1:])
    print(f"\n(write + transport) / copy: {rows[0]['share']:.2f} in the first turn, {later:.2f} after (median; wanted: at most 3)")


if __name__ == "__main__":
    main()

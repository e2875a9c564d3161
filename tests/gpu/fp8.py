"""FP8 on a GPU: `python tests/gpu/fp8.py [--backends triton,torch] [--tokens 8192] [--quick]`. Needs torch, transformers and triton alone.

It has not run yet: nobody who wrote it had a GPU. What it says, in this order, each with the device's name:

1. every backend against the reference, by shape: codes and scales bit by bit, products to 1e-3 of the norm (outputs in BF16) or 1e-6;
2. time of Fprop, Dgrad and Wgrad at the expert shapes of DeepSeek-V3 and Qwen3-30B-A3B, quantisation included, and of BF16 at the same;
3. forward and backward of a whole layer of experts (what dominates a learner's step) and its peak memory, FP8 and BF16.

It ends with 1 if a product is wrong. Aims: FP8 at least 1.6 times as fast as BF16 in Fprop and Dgrad, 1.3 times in Wgrad and the layer.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from rl.fp8 import experts
from rl.fp8.backends import Backend, backend_named
from rl.fp8.experts import ExpertCodes
from rl.fp8.quantize import COLUMN, SQUARE, TILE, quantize
from rl.fp8.reference import Reference
from rl.fp8.weights import Codes

GPU = torch.device("cuda")
CHECKED = [(128, 128, 128), (1, 256, 384), (37, 192, 320), (1000, 576, 7168), (512, 4096, 7168)]
"""Tokens M, outputs N, inputs K."""
SHAPES = {
    "DeepSeek-V3 gate_up": (8, 4096, 7168), "DeepSeek-V3 down": (8, 7168, 2048),
    "Qwen3-30B-A3B gate_up": (128, 1536, 2048), "Qwen3-30B-A3B down": (128, 2048, 768),
}  # fmt: skip
"""Experts on the GPU, outputs N, inputs K. Of DeepSeek-V3's 256 experts, 8: one of 32 ranks."""
LAYERS = {"DeepSeek-V3": (8, 7168, 2048), "Qwen3-30B-A3B": (128, 2048, 768)}
"""Experts, hidden size, width of an expert."""


def distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-30)).item()


def check(backend: Backend) -> int:
    """How many products or codes are wrong."""
    wrong, reference = 0, Reference()

    def say(what: str, error: float, limit: float) -> None:
        nonlocal wrong
        wrong += not error <= limit  # NaN is wrong
        print(f"  {backend.name} {what}: {error:.2e}{'' if error <= limit else '   WRONG'}")

    for m, n, k in CHECKED:
        torch.manual_seed(0)
        x, dy, w = (torch.randn(*size, device=GPU, dtype=torch.bfloat16) for size in ((m, k), (m, n), (n, k)))
        for block in (TILE, COLUMN, SQUARE):
            for power_of_two in (False, True):
                got, wanted = (b.quantize(x, block, power_of_two=power_of_two) for b in (backend, reference))
                off = (got.codes.view(torch.uint8) != wanted.codes.view(torch.uint8)).float().mean()
                off += (got.scales != wanted.scales).float().mean()
                say(f"quantise {m}x{k} {block} {power_of_two}", off.item(), 0.0)
        xq, wq, dq = quantize(x, TILE, power_of_two=True), quantize(w, SQUARE), quantize(dy, TILE)
        say(f"Fprop {m}x{n}x{k}", distance(backend.product(xq, wq, torch.bfloat16), reference.product(xq, wq, torch.float32)), 3e-3)
        say(f"Dgrad {m}x{n}x{k}", distance(backend.product(dq, wq.T, torch.bfloat16), reference.product(dq, wq.T, torch.float32)), 3e-3)
        say(f"Wgrad {m}x{n}x{k}", distance(backend.wgrad(dy, x), reference.wgrad(dy, x)), 1e-4)
    ends = torch.tensor([5, 5, 300, 1000], device=GPU)
    x, dy, w = (torch.randn(*size, device=GPU, dtype=torch.bfloat16) for size in ((1000, 512), (1000, 384), (4, 384, 512)))
    xq, wq = quantize(x, TILE, power_of_two=True), quantize(w, SQUARE)
    say("grouped", distance(backend.grouped(xq, wq, ends, torch.float32), reference.grouped(xq, wq, ends, torch.float32)), 1e-4)
    say("grouped Wgrad", distance(backend.grouped_wgrad(dy, x, ends), reference.grouped_wgrad(dy, x, ends)), 1e-4)
    return wrong


def milliseconds(run: Callable[[], Any], repeats: int) -> float:
    """Median of single runs, after three that do not count."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def time_products(backend: Backend, tokens: int, repeats: int) -> None:
    for name, (count, n, k) in SHAPES.items():
        torch.manual_seed(0)
        x, dy = (torch.randn(tokens, width, device=GPU, dtype=torch.bfloat16) for width in (k, n))
        w = torch.randn(count, n, k, device=GPU, dtype=torch.bfloat16) * 0.02
        ends = (torch.arange(1, count + 1, device=GPU) * tokens // count).to(torch.int32)
        for product, (ours, theirs) in pairs(backend, x, dy, w, ends).items():
            fp8, bf16 = milliseconds(ours, repeats), milliseconds(theirs, repeats)
            print(f"  {backend.name} {name} {product}, {tokens} rows: FP8 {fp8:.3f} ms, BF16 {bf16:.3f} ms, {bf16 / fp8:.2f} times as fast")


def pairs(
    backend: Backend, x: torch.Tensor, dy: torch.Tensor, w: torch.Tensor, ends: torch.Tensor
) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """FP8 and BF16 of each product."""
    codes = quantize(w, SQUARE)  # once per update, not per product
    wide = torch.nn.functional.grouped_mm
    return {
        "Fprop": (
            lambda: backend.grouped(backend.quantize(x, TILE, power_of_two=True), codes, ends, torch.bfloat16),
            lambda: wide(x, w.transpose(-1, -2), offs=ends),
        ),
        "Dgrad": (
            lambda: backend.grouped(backend.quantize(dy, TILE), codes.T, ends, torch.bfloat16),
            lambda: wide(dy, w, offs=ends),
        ),
        "Wgrad": (lambda: backend.grouped_wgrad(dy, x, ends), lambda: wide(dy.transpose(0, 1), x, offs=ends)),
    }


def time_layer(backend: Backend, tokens: int, repeats: int) -> None:
    for name, (count, hidden, width) in LAYERS.items():
        torch.manual_seed(0)
        config = Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=width, num_experts=count, num_experts_per_tok=8)
        config._experts_implementation = "grouped_mm"
        with GPU:
            bf16 = Qwen3MoeExperts(config).to(torch.bfloat16)
        for parameter in bf16.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        fp8 = copy.deepcopy(bf16).float()
        fp8.config._experts_implementation = experts.NAME
        fp8.fp8 = ExpertCodes(Codes(), Codes(), backend, True)
        x = torch.randn(tokens // 8, hidden, device=GPU, dtype=torch.bfloat16, requires_grad=True)
        weights, index = torch.randn(tokens // 8, count, device=GPU).softmax(-1).topk(min(8, count))
        said = {}
        for kind, layer in (("FP8", fp8), ("BF16", bf16)):
            said[kind] = time_and_memory(layer, x, index, weights.to(torch.bfloat16), repeats)
        (ours, ours_gb), (theirs, theirs_gb) = said["FP8"], said["BF16"]
        print(
            f"  {backend.name} layer of {name}, {tokens} rows: FP8 {ours:.2f} ms and {ours_gb:.2f} GB on top, "
            f"BF16 {theirs:.2f} ms and {theirs_gb:.2f} GB, {theirs / ours:.2f} times as fast"
        )


def time_and_memory(layer: Any, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, repeats: int) -> tuple[float, float]:
    """Milliseconds of forward and backward, and the most memory they take on top, in GB."""

    def run() -> None:
        layer(x, index, weights).sum().backward()
        layer.zero_grad()

    taken = milliseconds(run, repeats)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return taken, (torch.cuda.max_memory_allocated() - before) / 1e9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default="reference,triton,torch")
    parser.add_argument("--tokens", type=int, default=16384, help="rows over all experts")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="correctness alone")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA GPU here: nothing was checked", file=sys.stderr)
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    wrong = 0
    for name in given.backends.split(","):
        try:
            backend = backend_named(name, GPU)
        except ValueError as error:
            print(f"  {name}: cannot run here: {error}")
            wrong += 1
            continue
        wrong += check(backend)
        if not given.quick and name != "reference":
            time_products(backend, given.tokens, given.repeats)
            time_layer(backend, given.tokens, given.repeats)
    print(f"{wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

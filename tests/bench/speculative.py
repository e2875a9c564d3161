"""Whether vLLM drafts with the multi-token prediction module of a policy that we saved, and how often it keeps a draft.

    python -m tests.bench.speculative POLICY [--prompts 64]

Samples two-digit sums at temperature 1 with and without speculation, one draft token a step, and prints the share of drafts that were
accepted and the mean log-prob of what was sampled either way. The offline number to compare with is `mtp/acceptance` in metrics.jsonl,
or `mtp_acceptance` after SFT; vLLM drafts the likeliest token and not a sampled one, so its share is another number. On a CPU nothing
becomes faster by it; on a GPU it has not run.

vLLM 0.32 on a CPU samples nonsense where it speculates at a temperature (`rl/engines/repairs.py`); `--as-it-is` leaves the fault in.
"""

import argparse
import json
import os

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["TORCHDYNAMO_DISABLE"] = "1"

from pathlib import Path

import numpy as np
import vllm.v1.sample.rejection_sampler
from vllm import LLM, SamplingParams

from data.arithmetic import rows
from rl.engines.repairs import cpu_repairs, expand
from rl.policy import load_tokenizer


def sample(policy: Path, prompts: list[list[int]], speculate: bool) -> tuple[float, dict[str, float]]:
    """Mean log-prob a sampled token, and vLLM's counts of drafts."""
    drafter = {"method": "mtp", "num_speculative_tokens": 1, "attention_backend": "CPU_MLA"}
    args: dict[str, object] = {"speculative_config": drafter} if speculate else {}
    for repair in cpu_repairs(json.loads((policy / "config.json").read_text())):
        args |= repair.settings
    llm = LLM(
        str(policy), dtype="float32", max_model_len=128, max_num_seqs=16, enforce_eager=True, kv_cache_memory_bytes=64 << 20,
        disable_log_stats=False, logprobs_mode="processed_logprobs", seed=0, **args,
    )  # fmt: skip
    sampling = SamplingParams(max_tokens=48, temperature=1.0, logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    logps = [next(iter(token.values())).logprob for out in outputs for token in out.outputs[0].logprobs]
    counts = {m.name: float(m.value) for m in llm.get_metrics() if m.name.startswith("vllm:spec_decode") and hasattr(m, "value")}
    return float(np.mean(logps)), counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("policy", type=Path)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--as-it-is", action="store_true", help="vLLM's own step from requests to tokens")
    args = parser.parse_args()
    if not args.as_it_is:
        vllm.v1.sample.rejection_sampler.expand_batch_to_tokens = expand
    tokenizer = load_tokenizer(args.policy)
    texts = [row["prompt"] for row in rows({"digits": 2}, "test")[: args.prompts]]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    plain, _ = sample(args.policy, prompts, speculate=False)
    drafted, counts = sample(args.policy, prompts, speculate=True)
    drafts, kept = counts["vllm:spec_decode_num_draft_tokens"], counts["vllm:spec_decode_num_accepted_tokens"]
    print(f"{len(prompts)} prompts: {kept:.0f} of {drafts:.0f} drafts accepted, {kept / drafts:.3f}")
    print(f"mean log-prob of a sampled token: {plain:.4f} without, {drafted:.4f} with speculation")


if __name__ == "__main__":
    main()

"""What vLLM's drafter computes of a module that we saved is what the module computes here."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from made import deepseek_v3_with_module

from data.values import Completion, Group, Prompt, Score
from rl.attention import layout_of
from rl.batch import items_of, pack
from rl.mtp import mtp_hidden, mtp_layer
from rl.policy import load_model

pytest.importorskip("vllm", reason="vllm is not installed: `make install`")

CHECKOUT = Path(__file__).resolve().parents[2]
PROMPT = [2, 3, 4, 5, 6, 7, 8, 9]
DRAFTS = """
import json, os, sys
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1"}
import torch
import vllm.v1.sample.rejection_sampler
from vllm import LLM, SamplingParams
from vllm.model_executor.models.deepseek_mtp import DeepSeekMultiTokenPredictorLayer

from rl.engines.repairs import cpu_repairs
from tests.bench.speculative import expand

vllm.v1.sample.rejection_sampler.expand_batch_to_tokens = expand
policy, prompt, out = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
seen, forward = [], DeepSeekMultiTokenPredictorLayer.forward


def watched(self, input_ids, positions, *rest):
    found = forward(self, input_ids, positions, *rest)
    seen.append((input_ids.clone(), positions.clone(), found[1].clone()))
    return found


DeepSeekMultiTokenPredictorLayer.forward = watched
repairs = {k: v for r in cpu_repairs(json.loads((policy / "config.json").read_text())) for k, v in r.settings.items()}
llm = LLM(
    str(policy), dtype="float32", max_model_len=128, max_num_seqs=2, enforce_eager=True, kv_cache_memory_bytes=64 << 20,
    speculative_config={"method": "mtp", "num_speculative_tokens": 1}, **repairs,
)
seen.clear()
(answer,) = llm.generate([{"prompt_token_ids": prompt}], SamplingParams(max_tokens=12, seed=3, detokenize=False), use_tqdm=False)
torch.save((list(answer.outputs[0].token_ids), seen), out)
"""


@pytest.mark.slow
def test_vllms_drafter_reads_and_computes_what_the_module_does_here(tmp_path: Path) -> None:
    folder = deepseek_v3_with_module(tmp_path / "policy", seed=0)
    command = [sys.executable, "-c", DRAFTS, str(folder), str(PROMPT), str(tmp_path / "seen.pt")]
    subprocess.run(command, check=True, cwd=CHECKOUT, stdout=subprocess.DEVNULL)
    tokens, seen = torch.load(tmp_path / "seen.pt")

    model = load_model(folder, torch.float32)
    n = len(tokens)
    completion = Completion(
        "p", "g", 0, 0, 0, np.array(tokens, np.int32), np.ones(n, np.uint8), np.zeros(n, np.float32), np.zeros(n, np.int32), "length", ""
    )
    group = Group("g", Prompt("p", "", "", np.array(PROMPT, np.int32)), 0, (completion,), (Score(1.0),))
    work, normaliser = items_of([group], torch.ones(1, 1), False, skip_zero=False)
    batch = pack(work, normaliser, temperature=1.0, max_tokens=n, share_prompt=False)
    with torch.no_grad():
        embedded = model.get_input_embeddings()(batch.tokens_T)
        positions = {"input_ids": batch.tokens_T[None], "position_ids": batch.position_T[None]}
        hidden = model.get_decoder()(**positions, use_cache=False, cohort=layout_of(batch)).last_hidden_state[0]
        ours = mtp_hidden(model, embedded, hidden, batch, detach=False)
        layer = mtp_layer(model)
        assert layer is not None
        layer.enorm.register_forward_pre_hook(lambda module, args: (torch.where(args[0] == 0, embedded[1], args[0]),))
        leaning = mtp_hidden(model, embedded, hidden, batch, detach=False)  # as without the blank at position 0
    # Row i of ours predicts completion token i: it has read up to the token before, so it stands at position prompt + i - 2.
    whole = [*PROMPT, *tokens]
    distance = torch.full((n,), torch.inf)
    leaning_distance = torch.full((n,), torch.inf)
    for ids, places, found in seen:
        for token, position, theirs in zip(ids.tolist(), places.tolist(), found, strict=True):
            row = position + 2 - len(PROMPT)
            if 0 <= row < n and token == whole[position + 1]:  # a rejected draft's row comes once more with what was sampled instead
                distance[row] = min(distance[row], (theirs - ours[row]).abs().max())
                leaning_distance[row] = min(leaning_distance[row], (theirs - leaning[row]).abs().max())
    there = distance < torch.inf
    assert there.sum() >= n - 1
    assert distance[there].max() < 1e-4
    assert leaning_distance[there].max() > 1e-3

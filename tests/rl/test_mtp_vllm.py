"""Speculative sampling with a module that we saved: what vLLM drafts from it, what it samples, and what an update brings it."""

import subprocess
import sys
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import policies
import pytest
import torch
from made import deepseek_v3_with_module
from policies import EOS

from data.values import Completion, Group, Prompt, Score
from rl.attention import layout_of
from rl.batch import items_of, pack
from rl.engines.base import Died, Event, Finished, Request, Sampling
from rl.engines.vllm import VllmEngine
from rl.engines.weights import read_manifest
from rl.mtp import mtp_hidden, mtp_layer
from rl.policy import load_model
from rl.sync import WeightSync

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

from rl.engines.repairs import cpu_repairs, expand

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
    speculative_config={"method": "mtp", "num_speculative_tokens": 1, "attention_backend": "CPU_MLA"}, **repairs,
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


def start(folder: Path, logs: Path, name: str, asynchronous: bool = False) -> tuple[VllmEngine, "SimpleQueue[Event]"]:
    mailbox: SimpleQueue[Event] = SimpleQueue()
    engine = VllmEngine(name, folder, log_path=logs / f"{name}.log", max_model_len=64, slots=32, draft_tokens=2, asynchronous=asynchronous)
    engine.start(mailbox)
    return engine, mailbox


def sample(engine: VllmEngine, mailbox: "SimpleQueue[Event]", count: int, tokens: int) -> list[Completion]:
    prompt = np.array(PROMPT, np.int32)
    engine.submit([Request("p", "p#g", 0, i, 100 + i, prompt, Sampling(tokens)) for i in range(count)])
    found: list[Completion] = []
    while len(found) < count:
        event = mailbox.get(timeout=60)
        assert not isinstance(event, Died), event
        if isinstance(event, Finished):
            found.append(event.completion)
    return sorted(found, key=lambda c: c.index)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    made = tmp_path_factory.mktemp("policies")
    return [deepseek_v3_with_module(made / f"p{seed}", seed=seed) for seed in (0, 1)]


@pytest.mark.slow
def test_an_updated_engine_drafts_and_samples_as_a_fresh_one(folders: list[Path], tmp_path: Path) -> None:
    engine, mailbox = start(folders[0], tmp_path, "updated")
    sync = WeightSync([engine], read_manifest(folders[0]))
    assert sync.file is not None
    sync.file._chunk_bytes = 1  # most chunks then hold nothing of the drafter
    try:
        before = sample(engine, mailbox, 24, 24)
        sync.push(policies.Checkpoint(folders[1]), version=1)
        updated = sample(engine, mailbox, 24, 24)
    finally:
        engine.close()
        sync.close()
    engine, mailbox = start(folders[1], tmp_path, "fresh")
    try:
        fresh = sample(engine, mailbox, 24, 24)
    finally:
        engine.close()
    for found, folder, version in ((before, folders[0], 0), (updated, folders[1], 1), (fresh, folders[1], 0)):
        model = load_model(folder, torch.float32, attention_name="sdpa")
        for c in found:
            ids = torch.tensor([*PROMPT, *c.token_ids.tolist()])
            with torch.no_grad():
                logp = model(ids[None, :-1]).logits[0].log_softmax(-1).gather(1, ids[1:, None])[len(PROMPT) - 1 :, 0].numpy()
            assert np.abs(logp - c.engine_logp).mean() < 1e-5 and set(c.policy_version.tolist()) == {version}
    assert [c.token_ids.tolist() for c in updated] == [c.token_ids.tolist() for c in fresh]
    # A drafter with its first weights would draft otherwise, and be kept otherwise.
    assert [(c.drafted, c.drafts_kept) for c in updated] == [(c.drafted, c.drafts_kept) for c in fresh]
    assert 0 < sum(c.drafts_kept for c in fresh) < sum(c.drafted for c in fresh)


@pytest.mark.slow
def test_what_is_sampled_with_drafts_is_the_policys_distribution(folders: list[Path], tmp_path: Path) -> None:
    """Chi-square of the second token, the first that a draft was made for, against its exact probabilities."""
    engine, mailbox = start(folders[0], tmp_path, "engine", asynchronous=True)
    try:
        found = sample(engine, mailbox, 2000, 4)
    finally:
        engine.close()
    model = load_model(folders[0], torch.float32, attention_name="sdpa")
    with torch.no_grad():
        first = model(torch.tensor([PROMPT])).logits[0, -1].softmax(-1)
        second = model(torch.tensor([[*PROMPT, token] for token in range(len(first))])).logits[:, -1].softmax(-1)
    going_on = [c.token_ids[1] for c in found if len(c.token_ids) > 1]
    ends = len(found) - len(going_on)
    exact = (first[:, None] * second)[np.arange(len(first)) != EOS].sum(0)
    expected = np.append(exact.numpy(), float(first[EOS])) * len(found)
    observed = np.append(np.bincount(going_on, minlength=len(exact)), ends)
    often = expected >= 5
    assert expected[often].sum() > 0.9 * len(found)
    expected, observed = expected[often], observed[often]
    statistic = float(((observed - expected) ** 2 / expected).sum())
    freedom = len(expected)
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5, (statistic, freedom)

"""Conversations with real engines: what they sample is what the learner sees, and a run of them goes on to the bit."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import policies
import pytest
import torch
from made import reference_model
from safetensors.torch import load_file

from data.journal import Journal
from data.values import Completion, Prompt
from rl.conversation_pool import ConversationPool
from rl.engines.base import Engine, Request, Sampling
from rl.engines.hf import HfEngine
from rl.engines.vllm import VllmEngine
from rl.metrics import without_times
from rl.policy import load_model
from rl.pool import RolloutPool
from rl.replay import RouteRecorder, routes_of_pass

CHECKOUT = Path(__file__).resolve().parents[2]
TOKENIZER = policies.character_tokenizer(64)
PROMPT = Prompt("p", "0123", "0123", np.array([2, 3, 4, 5], np.int32))
SAMPLING = Sampling(24, 0.7)


async def one_turn(generate: Any, prompt: Prompt) -> Any:
    turn = await generate()
    return turn.token_ids, [1] * len(turn.token_ids)


async def three_turns(generate: Any, prompt: Prompt) -> Any:
    token_ids, mask = [], []
    for given in ("42", "7", ""):
        turn = await generate(token_ids, max_tokens=6)
        said = generate.encode(given)
        token_ids += turn.token_ids + said
        mask += [1] * len(turn.token_ids) + [0] * len(said)
    return token_ids, mask


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return policies.tiny_qwen3_moe(tmp_path_factory.mktemp("policy") / "moe", seed=0)


@pytest.fixture(scope="module", params=["hf", "vllm"])
def engine(request: pytest.FixtureRequest, policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    if request.param == "hf":
        yield HfEngine("engine-0", str(policy), torch.float32, slots=64, returns_routes=True)
        return
    pytest.importorskip("vllm", reason="vllm is not installed: `make install`")
    yield VllmEngine("engine-0", policy, log_path=tmp_path_factory.mktemp("log") / "engine.log", max_model_len=64, slots=16)


def sample(pool: RolloutPool, name: str) -> list[Completion]:
    done: dict[int, Completion] = {}
    requests = [Request("p", name, 0, i, 100 + i, PROMPT.token_ids, SAMPLING, 0, PROMPT) for i in range(6)]
    with pool:
        pool.collect([requests], lambda c: done.update({c.index: c}))
    return [done[i] for i in range(6)]


def talking(engine: Engine, function: Callable[..., Any]) -> ConversationPool:
    return ConversationPool([engine], function, "tool", TOKENIZER, timeout_s=60.0)


def test_one_turn_is_the_completion_without_a_conversation(engine: Engine) -> None:
    plain, talked = sample(RolloutPool([engine]), "a"), sample(talking(engine, one_turn), "a")
    assert len({c.token_ids.tobytes() for c in plain}) == 6
    for a, b in zip(plain, talked, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist() and (a.id, a.seed, a.finish_reason) == (b.id, b.seed, b.finish_reason)
        # The hf engine samples a group in one call and a conversation's turns in a call each.
        assert np.abs(a.engine_logp - b.engine_logp).max() < (1e-5 if engine.whole_groups else 1e-12)


def test_log_probs_and_routes_of_turns_are_those_of_one_forward_over_the_whole(engine: Engine, policy: Path) -> None:
    done = sample(talking(engine, three_turns), "b")
    again = sample(talking(engine, three_turns), "b")
    assert any(list(c.mask).count(0) == 3 for c in done)
    model, recorded = reference_model(policy), load_model(policy, torch.float32, attention_name="sdpa")
    recorder = RouteRecorder(recorded)
    for c, twin in zip(done, again, strict=True):
        assert c.token_ids.tobytes() == twin.token_ids.tobytes() and c.engine_logp.tobytes() == twin.engine_logp.tobytes()
        ids = torch.tensor([[*PROMPT.token_ids, *c.token_ids]]).long()
        with torch.no_grad(), recorder.recording() as notes:
            logp = (model(ids).logits[0, 3:-1] / 0.7).log_softmax(-1).gather(-1, ids[0, 4:, None]).squeeze(-1)
            recorded(ids[:, :-1])
        wrote = c.mask == 1
        assert np.abs(logp.numpy() - c.engine_logp)[wrote].max() < 1e-5 and np.isnan(c.engine_logp[~wrote]).all()
        if engine.whole_groups:
            assert c.routes is not None and c.routes_valid is not None and c.routes_valid[:-1].all()
            assert np.array_equal(np.sort(c.routes[:-1]), np.sort(routes_of_pass(notes).numpy()))


RECIPE = """
run: {name: run, seed: 3, output_dir: FOLDER/out}
policy: {path: POLICY}
prompts: {path: FOLDER/prompts.jsonl}
rollout: {engine: hf, group_size: 4, max_tokens: 16, conversation: "FOLDER/talk.py:talk"}
rewards: {plugins: ["FOLDER/plugin.py:digits"], parts: [{name: digits}], max_error_rate: 0.5}
loss: {replay: rollout}
learner: {steps: 4, prompts_per_step: 4, lr: 3.0e-3, warmup_steps: 0, steps_per_batch: 2, threads: 1}
eval: {every: 2, prompts: {path: FOLDER/prompts.jsonl}, samples: 2, greedy: false}
checkpoint: {every: 2, keep: 2}
"""
TALK = """
async def talk(generate, prompt):
    turn = await generate(max_tokens=5)
    if turn.token_ids[0] % 8 == 0:
        raise OSError("the tool is down")
    told = turn.token_ids + generate.encode(prompt.text[::-1])
    mask = [1] * len(turn.token_ids) + [0] * (len(told) - len(turn.token_ids))
    turn = await generate(told, stop="<")
    return told + turn.token_ids, mask + [1] * len(turn.token_ids)
"""
DIGITS = "def digits(completions, **columns):\n    return [sum(c.isdigit() for c in text) / 16 for text in completions]\n"


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["split", "colocate"])
def test_a_run_of_conversations_goes_on_after_a_stop_to_the_bit(placement: str, policy: Path, tmp_path: Path) -> None:
    """Some fail: on resuming they are asked again, and fail again. Taking turns with the learner changes no bit either."""
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "{a}{b}"}}\n' for a in "0123" for b in "456"))
    (tmp_path / "talk.py").write_text(TALK)
    (tmp_path / "plugin.py").write_text(DIGITS)
    (tmp_path / "run.yaml").write_text(RECIPE.replace("FOLDER", str(tmp_path)).replace("POLICY", str(policy)))

    def run(*overrides: str) -> None:
        command = [sys.executable, "-m", "rl.train", str(tmp_path / "run.yaml"), *overrides]
        done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    run()
    out, whole = tmp_path / "out" / "run", tmp_path / "whole"
    out.rename(whole)
    run("learner.steps=2", f"rollout.placement={placement}")
    run(f"rollout.placement={placement}")
    rows, wanted = (
        [without_times(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (out, whole)
    )
    assert rows == wanted
    left, right = (load_file(folder / "final" / "model.safetensors") for folder in (out, whole))
    assert all(torch.equal(left[name], right[name]) for name in left)
    steps = rows[1:]
    assert sum(row["conversation/failed"] for row in steps) > 0 and all(row["eval/turns"] > 1 for row in rows if "eval/turns" in row)
    assert all(1 < row["conversation/turns"] <= 2 and row["replay/live_tokens"] == 0.0 for row in steps)
    assert all(row["mismatch/flipped_tokens"] < 0.02 for row in steps)
    with Journal(out / "journal.sqlite", read_only=True) as journal:
        sums = journal.sums()
    assert sums.open == 0 and sums.sampled == sum(row["tokens/sampled"] for row in steps)
    assert sums.trained == sum(row["tokens/trained"] for row in steps)

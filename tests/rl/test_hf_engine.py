"""The engine on transformers: its samples are those of the softmax, its log-probs the learner's, its bits those of seed and prompt."""

import queue
from collections import Counter
from pathlib import Path

import numpy as np
import policies
import pytest
import torch
from transformers import AutoModelForCausalLM

from data.values import Completion
from rl.engines.base import Died, Event, Finished, Mailbox, Pulse, Request, Sampling
from rl.engines.hf import HfEngine
from rl.engines.weights import TensorSpec, WeightFile
from rl.policy import checkpoint_views, load_model, save_policy


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return policies.tiny_qwen3_moe(tmp_path_factory.mktemp("policy") / "moe", seed=0)


def group(seeds: list[int], sampling: Sampling, name: str = "g") -> list[Request]:
    prompt = np.array([5, 9, 13, 21], np.int32)
    return [Request("p", name, 0, i, seed, prompt, sampling) for i, seed in enumerate(seeds)]


def sample(engine: HfEngine, mailbox: Mailbox, requests: list[Request]) -> list[Completion]:
    engine.submit(requests)
    events = [said(mailbox) for _ in requests]
    assert all(isinstance(e, Finished) for e in events), events
    return sorted((e.completion for e in events), key=lambda c: c.index)


def said(mailbox: Mailbox) -> Event:
    """The next event that is no sign of life."""
    while isinstance(event := mailbox.get(timeout=60), Pulse):
        pass
    return event


@pytest.fixture(scope="module")
def started(policy: Path):
    mailbox: Mailbox = queue.SimpleQueue()
    engine = HfEngine("engine-0", str(policy), torch.float32, slots=64)
    engine.start(mailbox)
    yield engine, mailbox
    engine.close()


def test_first_tokens_follow_the_softmax(started, policy: Path) -> None:
    engine, mailbox = started
    drawn: Counter[int] = Counter()
    for n in range(20):
        done = sample(engine, mailbox, group(list(range(100 * n, 100 * n + 100)), Sampling(1, temperature=1.3), f"g{n}"))
        drawn.update(int(c.token_ids[0]) for c in done)
    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    with torch.no_grad():
        probability = (model(torch.tensor([[5, 9, 13, 21]])).logits[0, -1] / 1.3).softmax(-1).numpy()
    expected = 2000 * probability
    seen = np.array([drawn[i] for i in range(len(expected))])
    chi2 = ((seen - expected) ** 2 / expected).sum()
    assert chi2 < 2 * len(expected), chi2  # its mean is 63 with deviation 11


def test_log_probs_are_those_of_a_plain_forward(started, policy: Path) -> None:
    engine, mailbox = started
    done = sample(engine, mailbox, group([1, 2, 3, 4], Sampling(12, temperature=0.8)))
    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    for c in done:
        ids = torch.tensor([[5, 9, 13, 21, *c.token_ids.tolist()]])
        with torch.no_grad():
            logp = (model(ids).logits[0, 3:-1] / 0.8).log_softmax(-1).gather(-1, ids[0, 4:, None]).squeeze(-1)
        assert np.abs(logp.numpy() - c.engine_logp).mean() < 1e-5
        assert c.finish_reason in ("stop", "length") and len(c.token_ids) <= 12 and c.mask.all()


def test_a_completion_depends_on_its_seed_and_not_on_its_index(started) -> None:
    engine, mailbox = started
    first = sample(engine, mailbox, group([7, 8, 9], Sampling(10)))
    again = sample(engine, mailbox, group([9, 7, 8], Sampling(10)))
    for c, d in ((first[0], again[1]), (first[1], again[2]), (first[2], again[0])):
        assert c.token_ids.tolist() == d.token_ids.tolist()
        assert c.engine_logp.tobytes() == d.engine_logp.tobytes()


def test_greedy_takes_the_likeliest_token(started, policy: Path) -> None:
    engine, mailbox = started
    done = sample(engine, mailbox, group([1, 2], Sampling(5, temperature=0.0)))
    assert done[0].token_ids.tolist() == done[1].token_ids.tolist()
    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    want = model.generate(torch.tensor([[5, 9, 13, 21]]), max_new_tokens=5, do_sample=False)[0, 4:]
    assert done[0].token_ids.tolist() == want.tolist()


def test_a_stop_string_ends_a_completion_and_stays_in_it(started) -> None:
    engine, mailbox = started
    free = sample(engine, mailbox, group([3], Sampling(12)))[0]
    text = engine.tokenizer.decode(free.token_ids)
    stop = text[2:4]
    cut = sample(engine, mailbox, group([3], Sampling(12, stop=(stop,))))[0]
    assert cut.finish_reason == "stop"
    assert engine.tokenizer.decode(cut.token_ids) == text[: text.index(stop) + len(stop)]


def test_after_an_update_the_engine_is_a_fresh_one(policy: Path, tmp_path: Path) -> None:
    other = policies.tiny_qwen3_moe(tmp_path / "other", seed=1)
    mailboxes: list[Mailbox] = [queue.SimpleQueue(), queue.SimpleQueue()]
    updated, fresh = (HfEngine(f"e{i}", str(p), torch.float32, slots=8) for i, p in enumerate((policy, other)))
    updated.start(mailboxes[0])
    fresh.start(mailboxes[1])
    tensors = list(checkpoint_views(load_model(other, torch.float32)))
    file = WeightFile({name: TensorSpec("float32", tuple(t.shape)) for name, t in tensors})
    file.write(tensors)
    updated.begin_update(1)
    for chunk in file.chunks:
        updated.load(chunk)
    updated.end_update()
    requests = group([1, 2, 3], Sampling(10))
    for a, b in zip(sample(updated, mailboxes[0], requests), sample(fresh, mailboxes[1], requests), strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist()
        assert a.engine_logp.tobytes() == b.engine_logp.tobytes()
        assert set(a.policy_version.tolist()) == {1} and set(b.policy_version.tolist()) == {0}
    file.close()
    updated.close()
    fresh.close()


def test_an_aborted_completion_gives_what_it_has(policy: Path) -> None:
    mailbox: Mailbox = queue.SimpleQueue()
    engine = HfEngine("e", str(policy), torch.float32, slots=8)
    engine.start(mailbox)
    engine.pause()
    requests = group([1, 2], Sampling(400), "long")
    engine.submit(requests)
    engine.abort([r.id for r in requests])
    engine.resume()
    done = [said(mailbox) for _ in requests]
    assert all(isinstance(e, Finished) and e.completion.finish_reason in ("abort", "stop") for e in done)
    assert all(len(e.completion.token_ids) < 5 for e in done if isinstance(e, Finished))
    engine.close()


def test_a_failure_in_the_engine_is_a_death(policy: Path) -> None:
    mailbox: Mailbox = queue.SimpleQueue()
    engine = HfEngine("e", str(policy), torch.float32, slots=8)
    engine.start(mailbox)
    engine.submit([Request("p", "g", 0, 0, 1, np.array([10_000], np.int32), Sampling(3))])  # no such token
    event = said(mailbox)
    assert isinstance(event, Died) and "index out of range" in event.reason
    engine.close()


@pytest.mark.parametrize("kind", ["tiny_qwen3_moe", "tiny_deepseek_v3", "tiny_qwen3"])
def test_exported_names_and_bytes_are_those_of_save_pretrained(kind: str, tmp_path: Path) -> None:
    """And what is saved from them loads as the same model, experts included."""
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    path = getattr(policies, kind)(tmp_path / "policy", seed=0)
    model = load_model(path, torch.float32)
    want = load_file(path / "model.safetensors")
    assert want.keys() == dict(checkpoint_views(model)).keys()
    save_policy(tmp_path / "saved", checkpoint_views(model), model, AutoTokenizer.from_pretrained(path))
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert all(torch.equal(want[name], saved[name]) for name in want)
    weights, config = (tmp_path / "saved" / name for name in ("model.safetensors", "config.json"))
    assert weights.stat().st_mode == config.stat().st_mode  # whoever may read the one may read the other
    again = load_model(tmp_path / "saved", torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))

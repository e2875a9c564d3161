"""The vLLM engine against freshly loaded engines and transformers. One engine serves most tests: a start costs seconds.

Other architectures, and BF16, are in `test_agreement.py`.
"""

import os
import shutil
import signal
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest
import torch
from policies import EOS, Checkpoint, tiny_deepseek_v3, tiny_qwen3_moe
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

pytest.importorskip("vllm", reason="vllm is not installed: `make install`")

from data.values import Completion
from rl.engines.base import Died, EngineDead, Event, Finished, Pulse, Request, Sampling
from rl.engines.vllm import VllmEngine
from rl.engines.weights import read_manifest
from rl.sync import WeightSync

logging.disable_progress_bar()
SHORT = Sampling(24)
PROMPTS = [[2, 3, 4], [5, 6, 7, 8, 9, 10], [11], [12, 13] * 70]


class Bench:
    """An engine with its mailbox and its weight sync."""

    def __init__(self, policy: Path, log_path: Path) -> None:
        self.mailbox: SimpleQueue[Event] = SimpleQueue()
        self.engine = VllmEngine(log_path.stem, policy, log_path=log_path, max_model_len=384, slots=16)
        self.sync = WeightSync([self.engine], read_manifest(policy))
        self.engine.start(self.mailbox)

    def submit(self, sampling: Sampling, indices: range = range(16), group: str = "g") -> list[Request]:
        requests = [Request("p", group, 0, i, 1000 + i, np.array(PROMPTS[i % len(PROMPTS)], np.int32), sampling) for i in indices]
        self.engine.submit(requests)
        return requests

    def wait_for(self, tokens: int) -> None:
        """Until this many more tokens are sampled."""
        wanted = self.engine.health().tokens + tokens
        while self.engine.health().tokens < wanted:
            time.sleep(0.005)

    def collect(self, count: int) -> list[Completion]:
        events = [self.said() for _ in range(count)]
        assert all(isinstance(event, Finished) for event in events), events
        return sorted((event.completion for event in events), key=lambda completion: completion.index)

    def said(self, timeout_s: float = 30.0) -> Event:
        """The next event that is no sign of life."""
        while isinstance(event := self.mailbox.get(timeout=timeout_s), Pulse):
            pass
        return event

    def sample(self, sampling: Sampling = SHORT, indices: range = range(16)) -> list[Completion]:
        return self.collect(len(self.submit(sampling, indices)))

    def close(self) -> None:
        self.engine.close()
        self.sync.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policies")
    for seed in (0, 1):
        tiny_qwen3_moe(folder / f"moe{seed}", seed=seed)
    return folder


@pytest.fixture(scope="module")
def bench(folder: Path) -> Iterator[Bench]:
    bench = Bench(folder / "moe0", folder / "shared.log")
    yield bench
    bench.close()


@pytest.fixture
def first(bench: Bench, folder: Path) -> Bench:
    """The shared engine with the first policy's weights at version 1."""
    bench.sync.push(Checkpoint(folder / "moe0"), version=1)
    return bench


def same(got: list[Completion], wanted: list[Completion]) -> float:
    """Largest difference of a log-prob; tokens must be equal."""
    assert [c.token_ids.tolist() for c in got] == [c.token_ids.tolist() for c in wanted]
    return max(float(np.abs(a.engine_logp - b.engine_logp).max()) for a, b in zip(got, wanted, strict=True))


@cache
def load(policy: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)


def learner_logp(policy: Path, prompt: list[int], token_ids: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Log-prob of each token under transformers, fp32, one completion at a time."""
    ids = torch.tensor([*prompt, *token_ids.tolist()])
    with torch.no_grad():
        logp = (load(policy)(ids[None, :-1]).logits[0] / temperature).log_softmax(-1)
    return logp.gather(1, ids[1:, None])[len(prompt) - 1 :, 0].numpy()


def mean_distance(policy: Path, completions: list[Completion], temperature: float = 1.0) -> float:
    return float(
        np.mean(
            np.concatenate(
                [
                    np.abs(c.engine_logp - learner_logp(policy, PROMPTS[c.index % len(PROMPTS)], c.token_ids, temperature))
                    for c in completions
                ]
            )
        )
    )


def test_log_probs_are_those_of_transformers_at_the_sampling_temperature(first: Bench, folder: Path) -> None:
    assert mean_distance(folder / "moe0", first.sample()) < 1e-5
    assert mean_distance(folder / "moe0", first.sample(Sampling(24, temperature=0.7)), 0.7) < 1e-5


def test_greedy_takes_the_likeliest_token_and_reports_temperature_one(first: Bench, folder: Path) -> None:
    completion = first.sample(Sampling(6, temperature=0.0), range(1))[0]
    assert mean_distance(folder / "moe0", [completion]) < 1e-5
    ids = list(PROMPTS[0])
    for token in completion.token_ids.tolist():
        assert token == int(load(folder / "moe0")(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)


def test_after_a_sync_the_engine_equals_a_freshly_loaded_one(first: Bench, folder: Path) -> None:
    """Fails by 0.1 and more where vLLM repacks no experts (its silent reload bug)."""
    fresh = Bench(folder / "moe1", folder / "fresh.log")
    wanted = fresh.sample()
    fresh.close()
    before = first.sample()
    first.sync.push(Checkpoint(folder / "moe1"), version=2)
    first.sync.file.write((name, torch.zeros_like(t)) for name, t in Checkpoint(folder / "moe0").export())  # they are its own now
    got = first.sample()
    assert same(got, wanted) < 5e-7
    assert [c.token_ids.tolist() for c in got] != [c.token_ids.tolist() for c in before]
    assert {int(v) for c in got for v in c.policy_version} == {2}


def test_an_engine_that_slept_samples_as_before_after_an_update(first: Bench, folder: Path) -> None:
    """vLLM's own calls; on a CPU its workers have nothing to free, but the scheduler stands still and the parts wake one by one."""
    wanted = first.sample()
    for version in (1, 2):
        first.engine.sleep()
        first.engine.wake("weights")
        first.sync.push(Checkpoint(folder / "moe0"), version=version)
        first.engine.wake("kv_cache")
        again = first.sample()
        assert same(again, wanted) == 0.0 and set(again[0].policy_version.tolist()) == {version}


def test_a_second_sync_of_the_same_weights_changes_nothing(first: Bench, folder: Path) -> None:
    before = first.sample()
    first.sync.push(Checkpoint(folder / "moe0"), version=2)
    assert same(first.sample(), before) == 0.0


def test_seeds_decide_completions_whatever_else_is_in_the_batch(first: Bench) -> None:
    together = first.sample()
    alone = [first.sample(indices=range(i, i + 1))[0] for i in (0, 5, 10, 15)]
    assert same(alone, together[::5]) < 1e-6
    backwards = first.sample(indices=range(15, -1, -1))
    assert same(backwards, together) < 1e-6
    assert together[0].token_ids.tolist() != together[4].token_ids.tolist()  # one prompt, two seeds


def test_more_requests_than_slots_all_come_back_once(first: Bench) -> None:
    completions = first.sample(indices=range(100))
    assert [c.index for c in completions] == list(range(100))
    assert same(completions[:16], first.sample()) < 1e-6
    assert first.engine.health().running == 0


def test_a_completion_says_how_it_ended_and_keeps_the_tokens_that_ended_it(first: Bench) -> None:
    completions = first.sample(Sampling(60), range(40))
    for completion in completions:
        ended = completion.token_ids[-1] == EOS
        assert completion.finish_reason == ("stop" if ended else "length")
        assert ended or len(completion.token_ids) == 60
        assert len(completion.engine_logp) == len(completion.policy_version) == len(completion.mask) == len(completion.token_ids)
        assert completion.mask.tolist() == [1] * len(completion.token_ids)
    assert {c.finish_reason for c in completions} == {"stop", "length"}

    free = first.sample(indices=range(1))[0].token_ids
    pair = "".join(chr(ord("0") + token - 2) for token in free[4:6])
    stopped = first.sample(Sampling(24, stop=("never", pair)), range(1))[0]
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids.tolist() == free[:6].tolist()


def test_an_aborted_request_gives_back_what_it_has(first: Bench) -> None:
    whole = {c.index: c for c in first.sample(Sampling(300), range(20))}
    requests = first.submit(Sampling(300), range(20))
    first.wait_for(200)
    first.engine.abort([requests[19].id, requests[3].id, "unknown#0"])
    completions = first.collect(20)
    aborted = [c for c in completions if c.finish_reason == "abort"]
    assert {c.index for c in aborted} <= {3, 19} and len(aborted) >= 1
    for c in completions:
        assert c.token_ids.tolist() == whole[c.index].token_ids[: len(c.token_ids)].tolist()
        assert len(c.engine_logp) == len(c.token_ids)
    assert first.engine.health().running == 0


def test_paused_nothing_is_sampled_and_resumed_nothing_is_lost(first: Bench) -> None:
    undisturbed = first.sample(Sampling(200))
    first.submit(Sampling(200))
    first.wait_for(100)
    first.engine.pause()
    tokens = first.engine.health().tokens
    first.submit(Sampling(8), range(16, 18))
    time.sleep(0.3)
    assert first.engine.health().tokens == tokens
    assert first.engine.health().running >= 3
    first.engine.resume()
    assert same(first.collect(18)[:16], undisturbed) < 1e-6


def test_an_update_in_flight_changes_weights_between_two_tokens(first: Bench, folder: Path) -> None:
    first.submit(Sampling(200))
    first.wait_for(200)
    first.engine.pause()
    first.sync.push(Checkpoint(folder / "moe1"), version=2)
    first.engine.resume()
    mixed = [c for c in first.collect(16) if set(c.policy_version.tolist()) == {1, 2}]
    assert len(mixed) >= 3
    for c in mixed:
        assert np.all(np.diff(c.policy_version) >= 0)
        prompt = PROMPTS[c.index % len(PROMPTS)]
        for version, policy in ((1, "moe0"), (2, "moe1")):
            wanted = learner_logp(folder / policy, prompt, c.token_ids)
            there = c.policy_version == version
            # Also at the first token after the update: its keys and values were computed anew.
            assert np.abs(c.engine_logp - wanted)[there].max() < 1e-4


def test_an_update_in_flight_to_the_same_weights_changes_no_completion(first: Bench, folder: Path) -> None:
    undisturbed = first.sample(Sampling(200))
    first.submit(Sampling(200))
    first.wait_for(200)
    first.engine.pause()
    first.sync.push(Checkpoint(folder / "moe0"), version=2)
    first.engine.resume()
    disturbed = first.collect(16)
    assert {1, 2} in [set(c.policy_version.tolist()) for c in disturbed]
    assert same(disturbed, undisturbed) < 1e-5


def test_the_routing_bias_alone_reaches_the_engine(tmp_path: Path) -> None:
    old, new = tiny_deepseek_v3(tmp_path / "old", seed=0), tmp_path / "new"
    shutil.copytree(old, new)
    tensors = load_file(old / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("e_score_correction_bias"):
            tensors[name] = 5 * tensor.flip(0)
    save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
    bench = Bench(old, tmp_path / "engine.log")
    bench.sync.push(Checkpoint(new), version=1)
    sampled = bench.sample()
    assert mean_distance(new, sampled) < 1e-5
    assert mean_distance(old, sampled) > 1e-2, "the bias decides where tokens go"
    bench.close()


def test_a_killed_engine_is_one_event_and_starts_again_at_the_last_update(folder: Path) -> None:
    bench = Bench(folder / "moe0", folder / "killed.log")
    bench.sync.push(Checkpoint(folder / "moe1"), version=1)
    wanted = bench.sample(Sampling(40), range(4))
    bench.submit(Sampling(300))
    killed = time.perf_counter()
    os.kill(bench.engine.pid, signal.SIGKILL)
    events = []
    while not events or isinstance(events[-1], Finished):
        events.append(bench.said(timeout_s=5))
    assert time.perf_counter() - killed < 1.0
    assert isinstance(events[-1], Died) and events[-1].engine == "killed"
    assert "killed by SIGKILL" in events[-1].reason and f"last lines of {folder / 'killed.log'}" in events[-1].reason
    for call in (bench.engine.health, bench.engine.pause, lambda: bench.submit(Sampling(8))):
        with pytest.raises(EngineDead, match="engine killed is gone: killed by SIGKILL"):
            call()
    time.sleep(0.2)
    assert bench.mailbox.empty()

    bench.engine.start(bench.mailbox)
    assert bench.engine.health().version == 0
    bench.sync.replay(bench.engine)
    assert bench.engine.health().version == 1
    assert same(bench.sample(Sampling(40), range(4)), wanted) < 1e-6
    bench.close()
    assert bench.mailbox.empty()


def test_a_policy_that_cannot_be_loaded_is_an_error_with_the_reason(tmp_path: Path) -> None:
    mailbox: SimpleQueue[Event] = SimpleQueue()
    engine = VllmEngine("lost", tmp_path / "nowhere", log_path=tmp_path / "lost.log")
    with pytest.raises(EngineDead, match=r"engine lost is gone: FileNotFoundError: .*nowhere/config.json"):
        engine.start(mailbox)
    assert mailbox.empty()

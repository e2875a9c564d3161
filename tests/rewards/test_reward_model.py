"""A reward model: its logits one by one, in batches with padding, by a worker, and by vLLM's pooling are the same."""

import os
from pathlib import Path

import pytest
import torch
from policies import EOS, PAD, character_tokenizer
from transformers import Qwen3Config, Qwen3ForSequenceClassification

from data.recipe import InputError
from rewards.config import RewardsConfig
from rewards.job import ScoreJob
from rewards.reward_model import TransformersHead, batches
from rewards.reward_model_vllm import visible_gpu
from rewards.scorer import Scorer

CHAT = "{% for m in messages %}{{ m['role'][0] | upper }}{{ m['content'] }}{% endfor %}"
TEXTS = ["4", "22222222", "2>2", "", "9" * 40]


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("head")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, max_position_embeddings=128, initializer_range=0.1, pad_token_id=PAD, eos_token_id=EOS, num_labels=1,
    )  # fmt: skip
    Qwen3ForSequenceClassification(config).save_pretrained(path)
    tokenizer = character_tokenizer(64)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(path)
    return path


def expected(head: Path, texts: list[str]) -> list[float]:
    """By the model's own forward pass, one text at a time, so that there is no padding."""
    model = Qwen3ForSequenceClassification.from_pretrained(head, dtype=torch.float32).eval()
    tokenizer = character_tokenizer(64)
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0, 0].item() for text in texts]


def scores_of(head: Path, prompts: list, **options):
    part = {"name": "reward_model", "timeout_s": 120.0, "options": {"model": str(head), **options}}
    with Scorer(RewardsConfig.model_validate({"parts": [part], "memory_mb": 0})) as scorer:
        return scorer.score([ScoreJob("g", p, p if isinstance(p, str) else "", TEXTS, [[0]] * len(TEXTS), {}) for p in prompts])


def test_batches_hold_neighbours_in_length_within_the_limit():
    assert list(batches([5, 1, 3, 2, 9], 6)) == [[1, 3], [2], [0], [4]]
    assert list(batches([2, 2, 2], 6)) == [[0, 1, 2]]
    assert list(batches([], 6)) == []


def test_logits_are_raw_and_do_not_depend_on_the_batch(head):
    texts = ["2>2;" + text for text in TEXTS]
    alone = expected(head, texts)
    assert max(alone) - min(alone) > 0.5 and not all(0.0 <= logit <= 1.0 for logit in alone)
    tokenizer = character_tokenizer(64)
    for batch_tokens in (1, 60, 10_000):
        model = TransformersHead(str(head), None, "cpu", "float32", None, batch_tokens)
        assert model.logits([tokenizer(text)["input_ids"] for text in texts]) == pytest.approx(alone, abs=1e-5)
    ends = [[2, 3, EOS], [2, 3, PAD], [2, 3, PAD, PAD]]  # the padding token inside a text is a token
    model = TransformersHead(str(head), None, "cpu", "float32", None, 10_000)
    assert model.logits(ends) == pytest.approx([model.logits([one])[0] for one in ends], abs=1e-5)
    assert len({round(logit, 4) for logit in model.logits(ends)}) == 3


def test_a_worker_gives_the_logits_and_fails_what_is_too_long(head):
    scores, chat = scores_of(head, ["2>2;", [{"role": "user", "content": "2>2;"}]], max_length=20)
    assert [score.value for score in scores[:4]] == pytest.approx(expected(head, ["2>2;" + text for text in TEXTS[:4]]), abs=1e-5)
    assert scores[4].status == "error" and scores[4].detail == "reward_model: TooLong: 44 tokens, and the model reads 20"
    assert [score.value for score in chat[:4]] == pytest.approx(expected(head, ["U2>2;A" + text for text in TEXTS[:4]]), abs=1e-5)


VLLM = """
import os
from types import SimpleNamespace

seen = float(os.environ["CUDA_VISIBLE_DEVICES"])  # as vLLM, which reads it when it is imported

class PoolingParams:
    def __init__(self, use_activation): ...

class LLM:
    llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=100))

    def __init__(self, **options): ...

    def get_tokenizer(self):
        return lambda text, add_special_tokens: {"input_ids": [0] * len(text)}

    def classify(self, texts, **options):
        return [SimpleNamespace(outputs=SimpleNamespace(probs=[seen])) for _ in texts]
"""


def test_vllm_sees_the_gpu_that_was_chosen_of_those_that_the_run_may_see(tmp_path, monkeypatch):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text(VLLM)
    (tmp_path / "vllm" / "inputs.py").write_text("TokensPrompt = dict\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    for device, gpu in {"cuda:1": 7.0, "cuda:0": 4.0}.items():
        (scores,) = scores_of(tmp_path, ["2>2;"], engine="vllm", device=device)
        assert [score.value for score in scores] == [gpu] * len(TEXTS)
    with pytest.raises(InputError, match="device cuda:2 is not there: CUDA_VISIBLE_DEVICES is '4,7'"):
        scores_of(tmp_path, ["2>2;"], engine="vllm", device="cuda:2")
    assert visible_gpu("cuda:3", None) == "3"


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("COHORT_SKIP_VLLM") == "1", reason="COHORT_SKIP_VLLM is set")
def test_vllm_pooling_and_transformers_agree(head):
    pytest.importorskip("vllm")
    ours = [score.value for score in scores_of(head, ["2>2;"])[0]]
    (theirs,) = scores_of(head, ["2>2;"], engine="vllm", max_length=128)
    assert [score.value for score in theirs] == pytest.approx(ours, abs=1e-3), [score.detail for score in theirs]

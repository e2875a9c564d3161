"""`reward_model`: the raw logit of a sequence-classification model that was trained to tell better completions from worse.

A prompt of chat messages goes through the model's own chat template, with the completion as the assistant's message; a text
prompt is followed by the completion as it stands. Texts are sorted by length and go in batches of `batch_tokens`, padding
included. The model is loaded once, when the worker starts; `engine: vllm` loads it as a pooling model of vLLM, and both give the
same logits. A text longer than the model reads fails: a score of half a completion is no score. `device: cuda:1` is the second of
the GPUs that this run may see (CUDA_VISIBLE_DEVICES), with either engine; vLLM takes the first one, or the CPU, without.

The part's `timeout_s` is for one group. Weights count against `rewards.memory_mb`; set that to 0 for a large model.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from data.values import Messages
from rewards.text import completion_text, per_completion

_loaded: dict[str, Any] = {}
"""The model of this process, by the folder or hub id it came from."""


class TooLong(ValueError):
    """A text that the model cannot read whole."""


def prepare(
    model: str,
    engine: Literal["transformers", "vllm"] = "transformers",
    revision: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    max_length: int | None = None,
    batch_tokens: int = 16384,
    **engine_options: Any,
) -> None:
    """Loads the model; called once in a worker, before the first call."""
    if engine == "vllm":
        from rewards.reward_model_vllm import VllmHead  # the home of vLLM in this package

        _loaded[model] = VllmHead(model, revision, device, dtype, max_length, engine_options)
    elif engine == "transformers":
        _loaded[model] = TransformersHead(model, revision, device, dtype, max_length, batch_tokens)
    else:
        raise ValueError(f"reward_model has no engine '{engine}'; there are transformers and vllm")


def reward_model(
    prompts: list[str | Messages],
    completions: list[str | Messages],
    model: str,
    prompt_texts: list[str] | None = None,
    engine: str = "transformers",
    revision: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    max_length: int | None = None,
    batch_tokens: int = 16384,
    gpu_memory_utilization: float | None = None,
    **_: Any,
) -> list[float | Exception | None]:
    """Logits, one for each completion; `batch_tokens` is for transformers, `gpu_memory_utilization` for vLLM."""
    head = _loaded[model]
    rendered = zip(prompts, per_completion(prompt_texts, len(prompts)), completions, strict=True)
    ids = [head.token_ids(prompt, prompt_text, completion_text(completion)) for prompt, prompt_text, completion in rendered]
    short = [index for index, tokens in enumerate(ids) if len(tokens) <= head.max_length]
    logits = dict(zip(short, head.logits([ids[index] for index in short]), strict=True))
    return [logits.get(i, TooLong(f"{len(tokens)} tokens, and the model reads {head.max_length}")) for i, tokens in enumerate(ids)]


def render(tokenizer: Any, prompt: str | Messages, prompt_text: str, completion: str) -> list[int]:
    """A prompt and its completion as the reward model's token ids."""
    if isinstance(prompt, str):
        return (
            tokenizer(prompt_text or prompt, add_special_tokens=True)["input_ids"]
            + tokenizer(completion, add_special_tokens=False)["input_ids"]
        )
    messages = [*prompt, {"role": "assistant", "content": completion}]
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Places of texts in batches of neighbouring lengths, each of at most `batch_tokens` with padding (one text at least)."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: lengths[place]):
        if batch and (len(batch) + 1) * lengths[place] > batch_tokens:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


class TransformersHead:
    """The model by transformers."""

    def __init__(self, model: str, revision: str | None, device: str, dtype: str, max_length: int | None, batch_tokens: int) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

        config = AutoConfig.from_pretrained(model, revision=revision)
        if config.num_labels != 1:
            raise ValueError(f"'{model}' has {config.num_labels} labels; a reward model has 1")
        self._torch, self._device, self._batch_tokens = torch, device, batch_tokens
        self._tokenizer = AutoTokenizer.from_pretrained(model, revision=revision)
        loaded = AutoModelForSequenceClassification.from_pretrained(
            model, revision=revision, dtype=getattr(torch, dtype), use_safetensors=True
        )
        self._model = loaded.to(device).eval()
        self.max_length = max_length or config.max_position_embeddings

    def token_ids(self, prompt: str | Messages, prompt_text: str, completion: str) -> list[int]:
        return render(self._tokenizer, prompt, prompt_text, completion)

    def logits(self, ids: Sequence[Sequence[int]]) -> list[float]:
        """The raw logit of each text."""
        out = [0.0] * len(ids)
        with self._torch.inference_mode():
            for places in batches([len(tokens) for tokens in ids], self._batch_tokens):
                for place, logit in zip(places, self._batch([ids[place] for place in places]), strict=True):
                    out[place] = logit
        return out

    def _batch(self, ids: Sequence[Sequence[int]]) -> list[float]:
        torch = self._torch
        longest = max(map(len, ids))
        tokens_BT = torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for tokens in ids], device=self._device)
        lengths_B = torch.tensor([len(tokens) for tokens in ids], device=self._device)
        mask_BT = (torch.arange(longest, device=self._device) < lengths_B[:, None]).long()
        # Not the model's own pooling: it looks for the last token that is no padding, and a text may end with that very token.
        hidden_BTD = self._model.base_model(input_ids=tokens_BT, attention_mask=mask_BT).last_hidden_state
        last_BD = hidden_BTD[torch.arange(len(ids), device=self._device), lengths_B - 1]
        return self._model.score(last_BD)[:, 0].float().tolist()

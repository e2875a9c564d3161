"""A reward model as a pooling model of vLLM: the one place in this package that imports it, and only when a model is loaded."""

import os
from collections.abc import Sequence
from typing import Any

from data.values import Messages
from rewards.reward_model import render


def visible_gpu(device: str, seen: str | None) -> str:
    """CUDA_VISIBLE_DEVICES for `cuda:N` alone, where `seen` is its value so far, None if it is not set. ValueError without such a GPU."""
    index = int(device.removeprefix("cuda:"))
    if seen is None:
        return str(index)
    names = seen.split(",") if seen else []
    if index >= len(names):
        raise ValueError(f"reward_model: device {device} is not there: CUDA_VISIBLE_DEVICES is '{seen}'")
    return names[index]


class VllmHead:
    """The model by vLLM, on the GPU that `device` names as `cuda:N`, else where vLLM puts it; `options` go to its engine."""

    def __init__(self, model: str, revision: str | None, device: str, dtype: str, max_length: int | None, options: dict[str, Any]) -> None:
        # vLLM reads all three when it is imported. The worker is a process of its own already, and is killed as one; and on CPU
        # vLLM would take half of the machine for its cache, beside the learner.
        if device.startswith("cuda:"):
            os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpu(device, os.environ.get("CUDA_VISIBLE_DEVICES"))
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        from vllm import LLM, PoolingParams
        from vllm.inputs import TokensPrompt

        given = {name: value for name, value in options.items() if value is not None}
        self._llm = LLM(
            model=model, revision=revision, runner="pooling", convert="classify", dtype=dtype, max_model_len=max_length,
            enforce_eager=True, **given,
        )  # fmt: skip
        self._raw = PoolingParams(use_activation=False)  # the logit, not the sigmoid that vLLM gives by default
        self._prompt = TokensPrompt
        self._tokenizer = self._llm.get_tokenizer()
        self.max_length = self._llm.llm_engine.model_config.max_model_len

    def token_ids(self, prompt: str | Messages, prompt_text: str, completion: str) -> list[int]:
        return render(self._tokenizer, prompt, prompt_text, completion)

    def logits(self, ids: Sequence[Sequence[int]]) -> list[float]:
        """The raw logit of each text."""
        texts = [self._prompt(prompt_token_ids=list(tokens)) for tokens in ids]
        return [output.outputs.probs[0] for output in self._llm.classify(texts, pooling_params=self._raw, use_tqdm=False)]

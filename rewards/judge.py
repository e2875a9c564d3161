"""`judge`: a generative model judges, over any OpenAI-style endpoint: vLLM's own server, or a hosted one.

    rubric     a score by the rubric, each completion alone, the reasoning before the score (as in DeepSeek-V3, arXiv:2412.19437)
    reference  the same, with the row's gold answer shown as the reference
    pairwise   against siblings of the group, each pair in both orders; the value is the share of comparisons won, a tie is half

The verdict is structured output, `votes` of them are averaged to a value in [0, 1]. A verdict that cannot be read, after it was
asked for again, fails that completion: it is not 0, and not 0.5. So does one that is still missing shortly before the part's
`timeout_s` is over; the verdicts that are there count. What the policy wrote is fenced (`rewards.judge_prompt`).
Verdicts are cached by the hash of what was asked. The key is the environment variable that `key_env` names. A completion whose
reasoning never ends has no answer: it gets 0 without being asked about, and meets its siblings as an empty text.
"""

import asyncio
import os
from collections.abc import Awaitable, Sequence
from functools import lru_cache
from typing import Any, Literal

from data.values import Messages
from rewards.answers import find_golds
from rewards.judge_client import Client, Unreadable
from rewards.judge_prompt import PAIRWISE, RUBRIC, Question, pair_question, score_question
from rewards.registry import JUDGE_REQUEST_S
from rewards.text import answer_text, completion_text, per_completion

SPARE_S = 5.0
"""Left of the part's `timeout_s` for the way back; a fifth of it where that is less."""


async def judge(
    prompts: list[str | Messages],
    completions: list[str | Messages],
    group_ids: list[str],
    url: str,
    model: str,
    timeout_s: float,
    answer: list[Any] | None = None,
    solution: list[Any] | None = None,
    prompt_texts: list[str] | None = None,
    mode: Literal["rubric", "reference", "pairwise"] = "rubric",
    rubric: str | None = None,
    low: int = 1,
    high: int = 10,
    votes: int = 1,
    opponents: int = 2,
    reasoning: bool = False,
    temperature: float = 0.0,
    max_tokens: int = 1024,
    key_env: str | None = None,
    requests_at_once: int = 16,
    per_second: float | None = None,
    retries: int = 5,
    request_s: float = JUDGE_REQUEST_S,
    cache: str | None = None,
    **_: Any,
) -> list[float | Exception | None]:
    """Values in [0, 1]; an exception stands for a completion whose verdict could not be had; None where `reference` has none.

    `low`, `high`: the scale that the model is shown; `opponents`: siblings that each completion meets; `reasoning`: show what
    stands before `</think>` too; `requests_at_once`, `per_second`: limits of requests in all; `cache`: a folder; `timeout_s`: the
    part's, which the scorer hands over."""
    deadline = asyncio.get_running_loop().time() + timeout_s - min(SPARE_S, timeout_s / 5)
    if mode not in ("rubric", "reference", "pairwise"):
        raise ValueError(f"judge has no mode '{mode}'; there are rubric, reference and pairwise")
    if not low < high or votes < 1:
        raise ValueError(f"judge: low {low} has to be below high {high}, and votes {votes} at least 1")
    client = _client(
        url,
        model,
        temperature,
        max_tokens,
        key_env and os.environ[key_env],
        requests_at_once,
        per_second,
        retries,
        request_s,
        cache,
    )
    texts: list[str | None] = [completion_text(completion) for completion in completions]
    if not reasoning:
        rendered = per_completion(prompt_texts, len(prompts))
        texts = [answer_text(text or "", prompt_text) for text, prompt_text in zip(texts, rendered, strict=True)]
    if mode == "pairwise":
        return await _pairwise(client, prompts[0], [text or "" for text in texts], rubric or PAIRWISE, votes, opponents, deadline)
    asked: list[Awaitable[float | Exception | None]] = []
    for index, text in enumerate(texts):
        golds = find_golds({"answer": answer and answer[index], "solution": solution and solution[index]})
        if mode == "reference" and not golds:
            asked.append(_at_once(None))
            continue
        if text is None:
            asked.append(_at_once(0.0))
            continue
        reference = golds[0] if mode == "reference" else None
        question = score_question(prompts[index], text, rubric or RUBRIC, low, high, reference)
        asked.append(_mean_score(client, question, low, high, votes, deadline))
    return list(await asyncio.gather(*asked))


async def _at_once(value: float | None) -> float | None:
    return value


async def _mean_score(client: Client, question: Question, low: int, high: int, votes: int, deadline: float) -> float | Exception:
    said = await asyncio.gather(*(client.ask(question, vote, deadline) for vote in range(votes)), return_exceptions=True)
    failed = next((one for one in said if isinstance(one, BaseException)), None)
    if failed is not None:
        return _expected(failed)
    return sum((verdict["score"] - low) / (high - low) for verdict in said if isinstance(verdict, dict)) / votes


async def _pairwise(
    client: Client, prompt: str | Messages, texts: Sequence[str], rubric: str, votes: int, opponents: int, deadline: float
) -> list[float | Exception | None]:
    """Each completion meets the next `opponents` of the group, in a ring, in both orders."""
    count = len(texts)
    pairs = {tuple(sorted((i, (i + step) % count))) for i in range(count) for step in range(1, min(opponents, count - 1) + 1)}
    ordered = sorted({order for i, j in pairs for order in ((i, j), (j, i))})
    asked = [client.ask(pair_question(prompt, texts[i], texts[j], rubric), vote, deadline) for i, j in ordered for vote in range(votes)]
    said = await asyncio.gather(*asked, return_exceptions=True)
    points: list[list[float]] = [[] for _ in texts]
    failed: dict[int, Exception] = {}
    for (i, j), verdict in zip([pair for pair in ordered for _ in range(votes)], said, strict=True):
        if isinstance(verdict, BaseException):
            failed |= dict.fromkeys((i, j), _expected(verdict))
            continue
        first = {"first": 1.0, "tie": 0.5, "second": 0.0}[verdict["better"]]
        points[i].append(first)
        points[j].append(1.0 - first)
    return [failed.get(i) or (sum(won) / len(won) if won else None) for i, won in enumerate(points)]


def _expected(error: BaseException) -> Exception:
    """What a judge may fail by; anything else is a mistake of ours and is raised."""
    if isinstance(error, Unreadable | OSError):
        return error
    raise error


@lru_cache(maxsize=8)
def _client(*settings: Any) -> Client:
    """One for each endpoint of this process, so that limits hold over all calls."""
    return Client(*settings)

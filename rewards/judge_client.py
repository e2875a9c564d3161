"""The line to a judge: requests with limits, retries with backoff, and a cache of verdicts.

What may pass by itself (429, 5xx, a lost connection, no answer in time) is asked again, later each time, and not before the
server's Retry-After. A verdict that its schema refuses is asked for again at another seed, twice at most."""

import asyncio
import hashlib
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import httpx
import jsonschema

from rewards.judge_prompt import Question

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 30.0
RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
READINGS = 3
"""Times that a verdict is asked for until one can be read."""


class Unreadable(Exception):
    """The judge said nothing that is a verdict."""


class Unreachable(OSError):
    """The endpoint refused, or did not answer."""


class Client:
    """One endpoint and model; its methods belong to one event loop."""

    def __init__(
        self, url: str, model: str, temperature: float, max_tokens: int, key: str | None, at_once: int, per_second: float | None,
        retries: int, request_s: float, cache: str | None,
    ) -> None:  # fmt: skip
        self._url = f"{url.rstrip('/')}/chat/completions"
        self._body = {"model": model, "temperature": temperature, "max_tokens": max_tokens}
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.AsyncClient(headers=headers, timeout=request_s)
        self._limit = asyncio.Semaphore(at_once)
        self._interval_s = 1.0 / per_second if per_second else 0.0
        self._next_start = 0.0
        self._retries = retries
        self._cache = Path(cache) if cache else None

    async def ask(self, question: Question, vote: int) -> dict[str, Any]:
        """The verdict, as its schema has it; Unreadable or Unreachable if there is none."""
        key = hashlib.sha256(json.dumps([self._url, self._body, question.digest, vote], sort_keys=True).encode()).hexdigest()
        path = self._cache / key[:2] / f"{key}.json" if self._cache else None
        if path and path.is_file():
            return json.loads(path.read_text())
        said = ""
        for reading in range(READINGS):
            said = await self._post(question, seed=vote * READINGS + reading)
            try:
                verdict = json.loads(said)
                jsonschema.validate(verdict, question.schema)
            except (ValueError, RecursionError, jsonschema.ValidationError):
                continue
            if path:
                _write(path, verdict)
            return verdict
        raise Unreadable(f"the judge gave no verdict that can be read, but {said!r:.120}")

    async def _post(self, question: Question, seed: int) -> str:
        schema = {"name": "verdict", "strict": True, "schema": question.schema}
        body = {**self._body, "seed": seed, "messages": question.messages()}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
        problem = ""
        for attempt in range(self._retries + 1):
            async with self._limit:
                await self._turn()
                try:
                    reply = await self._http.post(self._url, json=body)
                except httpx.TransportError as error:
                    problem, after_s = f"{type(error).__name__}: {error}", 0.0
                else:
                    if reply.status_code == 200:
                        return _content(reply)
                    problem, after_s = f"{reply.status_code}: {reply.text:.200}", _retry_after(reply)
                    if reply.status_code not in RETRIED:
                        break
            if attempt < self._retries:
                wait_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**attempt) * random.uniform(0.5, 1.0)
                await asyncio.sleep(max(after_s, wait_s))
        raise Unreachable(f"{self._url} answered {' '.join(problem.split())}")

    async def _turn(self) -> None:
        """Waits for a place in the rate."""
        now = time.monotonic()
        start = max(now, self._next_start)
        self._next_start = start + self._interval_s
        await asyncio.sleep(start - now)


def _content(reply: httpx.Response) -> str:
    try:
        return str(reply.json()["choices"][0]["message"]["content"])
    except (ValueError, KeyError, IndexError, TypeError):
        return reply.text


def _retry_after(reply: httpx.Response) -> float:
    said = reply.headers.get("retry-after", "")
    return min(LONGEST_WAIT_S, float(said)) if said.replace(".", "", 1).isdigit() else 0.0


def _write(path: Path, verdict: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps(verdict))
    aside.replace(path)

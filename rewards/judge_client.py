"""The line to a judge: requests with limits, retries with backoff, and a cache of verdicts.

What may pass by itself (429, 5xx, a lost connection, no answer in time) is asked again, later each time, and not before the
server's Retry-After. A verdict that its schema refuses is asked for again at another seed, twice at most. Each question has a
deadline: it is given up then, or as soon as it could only be asked again later than that."""

import asyncio
import hashlib
import json
import os
import random
import re
import time
from datetime import UTC
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx
import jsonschema

from rewards.judge_prompt import Question

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 30.0
RETRIED = frozenset({408, 409, 425, 429})
"""And from 500 on, but for FINAL."""
FINAL = frozenset({501, 505})
"""The server cannot do this, and later it cannot either."""
LOOPBACK: dict[str, httpx.AsyncBaseTransport | None] = {"all://127.0.0.1": None, "all://localhost": None, "all://[::1]": None}
"""A proxy of the environment is for what is outside this machine."""
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
        self._http = httpx.AsyncClient(headers=headers, timeout=request_s, mounts=LOOPBACK)
        self._limit = asyncio.Semaphore(at_once)
        self._interval_s = 1.0 / per_second if per_second else 0.0
        self._next_start = 0.0
        self._retries = retries
        self._cache = Path(cache) if cache else None

    async def ask(self, question: Question, vote: int, deadline: float) -> dict[str, Any]:
        """The verdict, as its schema has it; Unreadable or Unreachable if there is none. `deadline`: by the clock of the loop."""
        key = hashlib.sha256(json.dumps([self._url, self._body, question.digest, vote], sort_keys=True).encode()).hexdigest()
        path = self._cache / key[:2] / f"{key}.json" if self._cache else None
        if path and path.is_file():
            return json.loads(path.read_text())
        said = ""
        for reading in range(READINGS):
            said = await self._post(question, vote * READINGS + reading, deadline)
            try:
                verdict = json.loads(said)
                jsonschema.validate(verdict, question.schema)
            except (ValueError, RecursionError, jsonschema.ValidationError):
                continue
            if path:
                _write(path, verdict)
            return verdict
        raise Unreadable(f"the judge gave no verdict that can be read, but {said!r:.120}")

    async def _post(self, question: Question, seed: int, deadline: float) -> str:
        schema = {"name": "verdict", "strict": True, "schema": question.schema}
        body = {**self._body, "seed": seed, "messages": question.messages()}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
        problem = "nothing"
        try:
            async with asyncio.timeout_at(deadline):
                for attempt in range(self._retries + 1):
                    reply = await self._once(body, deadline)
                    if isinstance(reply, httpx.Response) and reply.status_code == 200:
                        return _content(reply)
                    problem = _problem(reply)
                    if attempt == self._retries or not _may_pass(reply):
                        break
                    wait_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**attempt) * random.uniform(0.5, 1.0)
                    await _sleep_until(asyncio.get_running_loop().time() + max(wait_s, _retry_after(reply)), deadline)
        except TimeoutError:
            problem += "; timeout_s leaves no time to ask again"
        raise Unreachable(f"{self._url} answered {problem}")

    async def _once(self, body: dict[str, Any], deadline: float) -> httpx.Response | httpx.TransportError:
        """One request, within the limits of all."""
        async with self._limit:
            start = max(asyncio.get_running_loop().time(), self._next_start)
            if start < deadline:  # who gives up takes no place in the rate
                self._next_start = start + self._interval_s
            await _sleep_until(start, deadline)
            try:
                return await self._http.post(self._url, json=body)
            except httpx.TransportError as error:
                return error


async def _sleep_until(start: float, deadline: float) -> None:
    """TimeoutError, at once, if that is too late."""
    if start >= deadline:
        raise TimeoutError
    await asyncio.sleep(start - asyncio.get_running_loop().time())


def _problem(reply: httpx.Response | httpx.TransportError) -> str:
    said = f"{reply.status_code}: {reply.text:.200}" if isinstance(reply, httpx.Response) else f"{type(reply).__name__}: {reply}"
    return " ".join(said.split())


def _may_pass(reply: httpx.Response | httpx.TransportError) -> bool:
    if isinstance(reply, httpx.TransportError):
        return True
    return reply.status_code in RETRIED or (reply.status_code >= 500 and reply.status_code not in FINAL)


def _content(reply: httpx.Response) -> str:
    try:
        return str(reply.json()["choices"][0]["message"]["content"])
    except (ValueError, KeyError, IndexError, TypeError):
        return reply.text


def _retry_after(reply: httpx.Response | httpx.TransportError) -> float:
    """Seconds that the server wants to be left alone: it says so as a number or a date (RFC 9110, 10.2.3)."""
    said = reply.headers.get("retry-after", "").strip() if isinstance(reply, httpx.Response) else ""
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", said):
        return float(said)
    try:
        due = parsedate_to_datetime(said)
    except (ValueError, OverflowError):
        return 0.0
    return (due if due.tzinfo else due.replace(tzinfo=UTC)).timestamp() - time.time()


def _write(path: Path, verdict: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps(verdict))
    aside.replace(path)

"""The learner's end of `rl.engines.http_server`. A connection that broke is opened again; a server that is gone is EngineDead."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import httpx

from rl.engines.base import EngineDead, Event, WeightChunk
from rl.engines.host import NotYours, Owned, Refused
from rl.engines.http_server import CONTENT_TYPE, HEAD, POLL_s
from rl.engines.server import Answer, Call, Failed, Ready
from rl.engines.weights import slot_bytes
from rl.engines.wire import Broken, Hello, Malformed, Welcome, decode, encode

TRIES_s = (0.0, 0.05, 0.3, 1.0)
"""Waits before each try to reach a server; every message may be sent twice."""
SILENT_s = 30.0
"""A server that owes an answer and says nothing for so long is gone."""
UPDATE_s = 600.0
"""The same while it may load weights; that it is gone is seen earlier, where events are asked for."""
PIECE_bytes = 4 << 20
ERRORS: dict[int, type[Exception]] = {401: Refused, 409: Refused, 423: Owned, 410: NotYours}


class HttpTransport:
    """Implements `rl.engines.remote.Transport`; for several threads."""

    def __init__(self, url: str, token: str | None) -> None:
        self.where = url.rstrip("/")
        headers = {"Content-Type": CONTENT_TYPE} | ({"Authorization": f"Bearer {token}"} if token is not None else {})
        # Servers stand beside the learner: a proxy of the environment is for what is outside.
        self._client = httpx.Client(base_url=self.where, headers=headers, timeout=SILENT_s, trust_env=False)

    def connect(self, hello: Hello) -> Welcome:
        return self._post("/connect", encode(hello), UPDATE_s)

    def calls(self, session: str, number: int, calls: Sequence[Call]) -> list[Answer | Broken]:
        return self._post("/calls", encode([session, number, list(calls)]), UPDATE_s)

    def events(self, session: str, after: int) -> list[Event | Ready | Failed]:
        return self._post("/events", encode([session, after]), POLL_s + SILENT_s)

    def weights(self, session: str, chunk: WeightChunk, version: int) -> None:
        head = encode([session, list(chunk.slots)])
        size = HEAD + len(head) + sum(map(slot_bytes, chunk.slots))

        def content() -> Iterator[bytes]:
            yield len(head).to_bytes(HEAD, "big") + head
            with open(chunk.path, "rb") as file:
                for slot in chunk.slots:
                    end = slot.offset + slot_bytes(slot)
                    for at in range(slot.offset, end, PIECE_bytes):
                        yield os.pread(file.fileno(), min(PIECE_bytes, end - at), at)

        self._post("/weights", content, SILENT_s, size)

    def leave(self, session: str) -> None:
        with suppress(httpx.HTTPError):
            self._client.post("/leave", content=encode([session]), timeout=1.0)

    def _post(self, path: str, body: Any, read_s: float, size: int | None = None) -> Any:
        """body: bytes, or what makes pieces of `size` bytes together."""
        headers = {"Content-Length": str(size)} if size is not None else {}
        timeout = httpx.Timeout(SILENT_s, read=read_s)
        for wait_s in TRIES_s:
            time.sleep(wait_s)
            try:
                answer = self._client.post(path, content=body() if callable(body) else body, headers=headers, timeout=timeout)
                break
            except httpx.TimeoutException:
                raise EngineDead(f"{self.where} does not answer") from None
            except httpx.TransportError as error:
                broken = error
        else:
            raise EngineDead(f"{self.where} cannot be reached: {broken}; is `python -m rl.serve RECIPE` running there?")
        if answer.status_code != httpx.codes.OK:
            line = answer.text.splitlines()[0] if answer.text else f"status {answer.status_code}"
            raise ERRORS.get(answer.status_code, EngineDead)(f"{self.where}: {line}")
        try:
            return decode(answer.content)
        except Malformed as error:
            raise EngineDead(f"{self.where}: {error}") from None

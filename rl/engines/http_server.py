"""A host behind HTTP: what `python -m rl.serve` runs. Each message is a POST of `rl.engines.wire`'s bytes.

    /connect  Hello -> Welcome                    /events   [session, after] -> what the engine said, as soon as it says something
    /calls    [session, number, calls] -> answers /weights  [session, slots], then the tensors' bytes, one after the other
    /leave    [session]                           GET /health  who has it, for people and load balancers; needs no token

The standard library's server does: there is one client, its messages are few and large, and it runs where neither vllm nor what comes
with it is installed. A thread is a connection; what waits, waits in its thread. A message that is not ours by its content type is
refused, so that no page in a browser can send one to a server on the loopback interface.
"""

import errno
import hmac
import http.client
import ipaddress
import json
import logging
import select
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from data.recipe import InputError
from rl.engines.base import EngineDead
from rl.engines.host import Host, NotYours, Owned
from rl.engines.weights import WeightMismatch
from rl.engines.wire import Malformed, decode, encode

log = logging.getLogger(__name__)

CONTENT_TYPE = "application/x-cohort"
HEAD = 8
"""Bytes that say how long the head of a /weights message is."""
MESSAGE_bytes = 1 << 28
"""Longest message, without the tensors of /weights."""
POLL_s = 5.0
"""Events are waited for so long; then the answer is that there are none."""
LOOK_s = 0.25
"""How often it is looked whether the owner's connection is still there."""
UNREAD_bytes = 1 << 24
"""What is read of a message that is refused, so that the answer finds somebody who listens."""
STRANGER_s = 10.0
"""A sender without the token who sends nothing for so long is not waited for."""
STATUS = {Owned: 423, NotYours: 410, WeightMismatch: 422, Malformed: 400, EngineDead: 503, InputError: 409}


def bind(host: str, port: int, token: str | None) -> "HttpServer":
    """Listens, before anything heavy is loaded. InputError if the port is in use, or others could reach it without a token."""
    if token is None and not _loopback(host):
        raise InputError(
            f"--host: {host} can be reached from other machines, and a server without a token would take weights from anybody there; "
            "set rollout.server_token_env to the name of an environment variable that holds a token, or leave --host at 127.0.0.1"
        )
    try:
        return HttpServer((host, port), token)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"--port: {port} on {host} is in use; choose another one, or end what listens there") from None
        raise InputError(f"--host: cannot listen on {host}, port {port}: {error.strerror or error}") from None


def _loopback(host: str) -> bool:
    try:
        return all(ipaddress.ip_address(info[4][0]).is_loopback for info in socket.getaddrinfo(host, None))
    except OSError as error:
        raise InputError(f"--host: no address of the name {host}: {error.strerror or error}") from None


class HttpServer(ThreadingHTTPServer):
    """Listens from the first; `serve` answers in threads of its own."""

    daemon_threads = True
    allow_reuse_address = True
    allow_reuse_port = False
    host: Host

    def __init__(self, address: tuple[str, int], token: str | None) -> None:
        self.address_family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]
        self.token = token
        super().__init__(address, Handler)

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://[{host!s}]:{port}" if self.address_family == socket.AF_INET6 else f"http://{host!s}:{port}"

    def serve(self, host: Host) -> None:
        self.host = host
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.1}, name="http", daemon=True).start()

    def server_bind(self) -> None:
        """As the parent's, without asking DNS for its own name."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("connection of %s broke", client_address, exc_info=True)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: HttpServer
    protocol_version = "HTTP/1.1"
    server_version = "cohort"
    sys_version = ""
    disable_nagle_algorithm = True
    timeout = 300.0
    """A connection on which nothing came for so long is closed; the client opens another."""

    def do_GET(self) -> None:
        if "Content-Length" in self.headers or "Transfer-Encoding" in self.headers:
            self.close_connection = True  # a body is not read, and must not be taken for the next request
        if self.path != "/health":
            return self._say(404, "there is /health to GET")
        self._answer(200, json.dumps(self.server.host.state()).encode() + b"\n", "application/json")

    def do_POST(self) -> None:
        try:
            if not self._may():
                return
            # Its answer is whole before it is sent: what fails in sending is no failure of the call.
            answer = self._route()
        except tuple(STATUS) as error:
            return self._say(next(status for kind, status in STATUS.items() if isinstance(error, kind)), str(error))
        except (ConnectionError, TimeoutError):
            raise
        except Exception as error:  # said to the learner, for whom this is the death of an engine
            log.exception("%s", self.path)
            return self._say(500, f"{type(error).__name__}: {error}")
        if answer is not None:
            self._answer(200, answer, CONTENT_TYPE)

    def _may(self) -> bool:
        """Whether the sender may send this; says what is wrong if not, and takes nothing in."""
        sent = self.headers.get("Authorization", "").removeprefix("Bearer ").encode()
        token, length = self.server.token, self.headers.get("Content-Length", "")
        if not length.isdecimal():
            self._say(411, "needs a Content-Length")
        elif token is not None and not hmac.compare_digest(sent, token.encode()):
            self.connection.settimeout(STRANGER_s)
            self.rfile.read(min(int(length), UNREAD_bytes))
            self._say(401, "needs the token that the server was started with; name its environment variable in rollout.server_token_env")
        elif self.headers.get("Content-Type") != CONTENT_TYPE:
            self._say(415, f"takes {CONTENT_TYPE}; it is for learners (rollout.servers)")
        else:
            return True
        return False

    def _route(self) -> bytes | None:
        host, size = self.server.host, int(self.headers["Content-Length"])
        if self.path == "/weights":
            return self._weights(host, size)
        message = self._message(size)
        match self.path, message:
            case "/connect", hello:
                return encode(host.connect(hello))
            case "/calls", [session, number, calls]:
                return encode(host.calls(session, number, calls))
            case "/events", [session, after]:
                return self._events(host, session, after)
            case "/leave", [session]:
                host.leave(session)
                return encode(None)
        raise Malformed(f"no message for {self.path}")

    def _message(self, size: int) -> Any:
        if size > MESSAGE_bytes:
            raise Malformed(f"a message of {size} bytes, more than {MESSAGE_bytes}")
        return decode(self._read(size))

    def _read(self, size: int) -> bytes:
        data = self.rfile.read(size)
        if len(data) < size:
            raise ConnectionAbortedError("the message broke off")
        return data

    def _weights(self, host: Host, size: int) -> bytes:
        head = int.from_bytes(self._read(HEAD), "big")
        session, slots = self._message(head)
        with host.stage(session, slots) as rooms:
            if HEAD + head + sum(len(room) for room in rooms) != size:
                raise Malformed(f"tensors of {sum(len(room) for room in rooms)} bytes in a message of {size}")
            for room in rooms:
                done = 0
                while done < len(room):
                    got = self.rfile.readinto(room[done:])
                    if not got:
                        raise ConnectionAbortedError("the tensors broke off")
                    done += got
        return encode(None)

    def _events(self, host: Host, session: str, after: int) -> bytes | None:
        until = time.monotonic() + POLL_s
        while not (said := host.events(session, after, LOOK_s)) and time.monotonic() < until:
            if self._gone():
                host.lost(session)
                self.close_connection = True
                return None
        return encode(said)

    def _gone(self) -> bool:
        """Whether the other end has closed the connection: while it waits for an answer it sends nothing else."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        try:
            return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b""
        except ConnectionError:
            return True

    def _say(self, status: int, line: str) -> None:
        """An error in words; what was not read of its message goes with the connection."""
        self.close_connection = True
        self._answer(status, line.encode(), "text/plain; charset=utf-8")

    def _answer(self, status: int, body: bytes, kind: str) -> None:
        """In one piece: of two small ones the second would wait for the first to be acknowledged."""
        head = f"HTTP/1.1 {status} {http.client.responses[status]}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        close = "Connection: close\r\n" if self.close_connection else ""
        self.wfile.write(f"{head}{close}\r\n".encode() + body)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)

"""Engines by URL: they give what engines of this machine give, and nothing is lost or taken twice when servers or connections break."""

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import httpx
import numpy as np
import policies
import psutil
import pytest
import torch

import rl.engines.host
import rl.engines.http_client
import rl.engines.lives
import rl.engines.make
import rl.engines.remote
import rl.serve
import rl.train
from data.recipe import InputError
from data.values import Completion, Prompt
from rl.config import PolicyConfig, RolloutConfig
from rl.conversation_pool import ConversationPool
from rl.engines.base import Died, Engine, EngineDead, Finished, Request, Sampling, TensorSlot
from rl.engines.http_server import CONTENT_TYPE, HEAD, HttpServer, bind
from rl.engines.make import make_engines, make_host
from rl.engines.remote import RemoteEngine
from rl.engines.server import Call
from rl.engines.weights import TensorSpec, read_manifest
from rl.engines.wire import Malformed, decode, encode
from rl.pool import RolloutPool
from rl.sync import WeightSync

CHECKOUT = Path(__file__).resolve().parents[2]
GROUPS, GROUP, TOKENS = 6, 4, 16
Done = dict[str, Completion]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policies")
    for seed in (0, 1):
        policies.tiny_qwen3_moe(folder / f"p{seed}", seed=seed)
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rl.engines.lives, "BACKOFF_s", 0.01)
    monkeypatch.setattr(rl.engines.remote, "RETRY_s", 0.2)
    monkeypatch.setattr(rl.engines.remote, "FIRST_s", 0.3)
    monkeypatch.setattr(rl.engines.http_client, "TRIES_s", (0.0, 0.05, 0.1))


class Servers:
    """Servers of this process; each can be lost, and started again at its address."""

    def __init__(self, policy: Path, work: Path, count: int = 1, token: str | None = None) -> None:
        self.policy = PolicyConfig(path=str(policy))
        self.work = work
        self.token = token
        self.up: list[HttpServer] = [bind("127.0.0.1", 0, token) for _ in range(count)]
        self.urls = [server.url for server in self.up]
        for server in self.up:
            self._serve(server)

    def _serve(self, server: HttpServer) -> None:
        server.connections = []  # type: ignore[attr-defined]
        handle = server.process_request_thread
        server.process_request_thread = lambda request, address: (server.connections.append(request), handle(request, address))  # type: ignore
        server.serve(make_host(RolloutConfig(engine="hf", slots=8), self.policy, None, self.work, returns_routes=True))

    def lose(self, index: int) -> None:
        """As if its process were killed: nobody listens, and connections break."""
        server = self.up[index]
        server.shutdown()
        server.server_close()
        for connection in server.connections:  # type: ignore[attr-defined]
            with_linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"  # closed by a reset
            try:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, with_linger)
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # closed already
        server.host.close()

    def start_again(self, index: int) -> None:
        port = int(self.urls[index].rsplit(":", 1)[1])
        self.up[index] = bind("127.0.0.1", port, self.token)
        self._serve(self.up[index])

    def rollout(self, **changes: Any) -> RolloutConfig:
        return RolloutConfig(engine="hf", servers=self.urls, slots=8, **changes)

    def close(self) -> None:
        for index in range(len(self.up)):
            self.lose(index)


@pytest.fixture
def servers(folder: Path, tmp_path: Path) -> Iterator[Callable[..., Servers]]:
    made: list[Servers] = []

    def start(count: int = 1, **changes: Any) -> Servers:
        made.append(Servers(folder / "p0", tmp_path, count, **changes))
        return made[-1]

    yield start
    for one in made:
        one.close()


def engines_of(rollout: RolloutConfig, policy: Path, work: Path) -> list[Engine]:
    return make_engines(
        rollout, PolicyConfig(path=str(policy)), policy, 64, work, returns_routes=True, manifest=read_manifest(policy)
    )  # fmt: skip


def groups() -> list[list[Request]]:
    prompts = np.random.default_rng(0).integers(2, 60, (GROUPS, 5)).astype(np.int32)
    return [[Request(f"p{p}", f"g{p}", 0, i, 100 * p + i, prompts[p], Sampling(TOKENS), p) for i in range(GROUP)] for p in range(GROUPS)]


def talking(engines: list[Engine], **named: Any) -> ConversationPool:
    async def three_turns(generate: Any, prompt: Prompt) -> Any:
        token_ids, mask = [], []
        for given in ("42", "7", ""):
            turn = await generate(token_ids, max_tokens=5)
            said = generate.encode(given)
            token_ids += turn.token_ids + said
            mask += [1] * len(turn.token_ids) + [0] * len(said)
        return token_ids, mask

    return ConversationPool(engines, three_turns, "tool", policies.character_tokenizer(64), timeout_s=60.0, **named)


def sample(
    engines: list[Engine],
    folder: Path,
    at: dict[int, Callable[[], None]] | None = None,
    make_pool: Callable[..., RolloutPool] = RolloutPool,
) -> tuple[Done, dict[str, float], list[str]]:
    """Completions of all groups with the second policy's weights; `at` is done when so many completions have come."""
    sync = WeightSync(engines, read_manifest(folder / "p0"))
    got: list[Completion] = []
    said: list[str] = []

    def seen(completion: Completion) -> None:
        got.append(completion)
        if at is not None and len(got) in at:
            at[len(got)]()

    with make_pool(engines, say=said.append) as pool:
        pool.catch_up = sync.replay
        sync.push(policies.Checkpoint(folder / "p1"), version=1)
        asked = groups()
        if make_pool is talking:
            asked = [[replace(r, prompt=Prompt(r.prompt_id, "", "", r.prompt_ids)) for r in group] for group in asked]
        pool.collect(asked, seen)
        deadline = time.monotonic() + 20
        while (numbers := pool.metrics())["engines/alive"] < len(engines) and time.monotonic() < deadline:
            pool.poll(0.01)
    sync.close()
    assert len(got) == GROUPS * GROUP
    return {c.id: c for c in got}, numbers, said


@pytest.fixture(scope="module")
def local(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """What two engines of this process give."""
    got, _, said = sample(
        engines_of(RolloutConfig(engine="hf", engines=2, slots=8), folder / "p0", tmp_path_factory.mktemp("logs")), folder
    )
    assert said == []
    return got


def assert_same(got: Done, wanted: Done, but: tuple[str, ...] = ()) -> None:
    """Every field, arrays byte for byte."""
    assert got.keys() == wanted.keys()
    for name, completion in got.items():
        for field, value in vars(wanted[name]).items():
            mine = getattr(completion, field)
            if field in but:
                continue
            if isinstance(value, np.ndarray):
                assert (mine.dtype, mine.shape, mine.tobytes()) == (value.dtype, value.shape, value.tobytes()), (name, field)
            else:
                assert mine == value, (name, field)


def test_two_engines_by_url_give_the_completions_of_the_local_pool(servers, folder: Path, tmp_path: Path, local: Done) -> None:
    there = servers(2, token="secret")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKEN", "secret")
        engines = engines_of(there.rollout(server_token_env="TOKEN"), folder / "p0", tmp_path)
    got, numbers, said = sample(engines, folder)
    assert_same(got, local)
    assert {c.policy_version.tolist()[0] for c in got.values()} == {1} and all(c.routes is not None for c in got.values())
    assert said == [] and numbers["engines/alive"] == 2


def test_a_lost_server_loses_no_group_and_is_taken_back_at_the_current_weights(servers, folder: Path, tmp_path: Path, local: Done) -> None:
    there = servers(2)
    engines = engines_of(there.rollout(), folder / "p0", tmp_path)
    again = threading.Timer(0.5, there.start_again, [0])
    got, numbers, said = sample(engines, folder, {5: lambda: there.lose(0), 6: again.start})
    assert_same(got, local, but=("engine",))  # what one could not finish, the other did, with the same seeds
    assert numbers["engines/alive"] == 2, said
    assert [line.split(",")[0] for line in said] == ["engine engine-0 died", "engine engine-0 is back"], said
    assert "cannot be reached" in said[0] or "ended" in said[0]


def test_conversations_on_servers_are_those_of_the_local_pool_also_when_one_is_lost(servers, folder: Path, tmp_path: Path) -> None:
    here = engines_of(RolloutConfig(engine="hf", engines=2, slots=8), folder / "p0", tmp_path)
    wanted, _, _ = sample(here, folder, make_pool=talking)
    assert any(list(c.mask).count(0) == 3 for c in wanted.values())
    there = servers(2)
    engines = engines_of(there.rollout(), folder / "p0", tmp_path)
    got, _, said = sample(engines, folder, make_pool=talking)
    assert_same(got, wanted, but=("engine",))  # which engine has a turn is a matter of time, what it says is not
    assert said == []
    again = threading.Timer(0.5, there.start_again, [0])
    got, numbers, said = sample(engines, folder, {5: lambda: there.lose(0), 6: again.start}, make_pool=talking)
    assert_same(got, wanted, but=("engine",))
    assert numbers["engines/alive"] == 2 and [line.split(",")[0] for line in said] == ["engine engine-0 died", "engine engine-0 is back"], (
        said
    )


def test_a_run_that_no_server_answers_says_that_it_waits(servers, folder: Path, tmp_path: Path, local: Done) -> None:
    there = servers(1)
    policy, lines = folder / "p0", []
    engines = make_engines(
        there.rollout(), PolicyConfig(path=str(policy)), policy, 64, tmp_path, returns_routes=True, manifest=read_manifest(policy),
        say=lines.append,
    )  # fmt: skip
    again = threading.Timer(0.5, there.start_again, [0])
    got, _, _ = sample(engines, folder, {5: lambda: there.lose(0), 6: again.start})
    assert_same(got, local, but=("engine",))
    assert len(lines) == 1 and "no engine answers; the run waits for one" in lines[0] and there.urls[0] in lines[0], lines


def test_broken_connections_lose_nothing_and_do_nothing_twice(servers, folder: Path, tmp_path: Path, local: Done) -> None:
    """Every third answer is lost on its way back, after the server has done what it was asked."""
    engines = engines_of(servers(2).rollout(), folder / "p0", tmp_path)
    for engine in engines:
        assert isinstance(engine, RemoteEngine)
        break_answers(engine.transport._client, every=3)  # type: ignore[attr-defined]
    got, numbers, said = sample(engines, folder)
    assert_same(got, local)
    assert said == [] and numbers["engines/reasked"] == 0 and numbers["tokens/lost"] == 0


def break_answers(client: httpx.Client, every: int) -> None:
    send, count = client.send, iter(range(1, 10**9))

    def broken(request: httpx.Request, **options: Any) -> httpx.Response:
        answer = send(request, **options)
        if next(count) % every == 0:
            raise httpx.ReadError("lost on its way", request=request)
        return answer

    client.send = broken  # type: ignore[method-assign]


def test_a_run_ends_with_a_reason_when_all_servers_stay_away(servers, folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(rl.engines.remote, "GONE_s", 0.5)
    there = servers(2)
    engines = engines_of(there.rollout(), folder / "p0", tmp_path)
    with pytest.raises(EngineDead, match=r"no engine could be reached for \d+ s; http") as error:
        sample(engines, folder, {5: lambda: [there.lose(0), there.lose(1)] and None})
    assert "Connection refused; is `python -m rl.serve RECIPE` running there?" in str(error.value)


def test_a_server_that_is_not_there_is_one_line(folder: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    (engine,) = engines_of(RolloutConfig(engine="hf", servers=[url]), folder / "p0", tmp_path)
    with pytest.raises(InputError, match=rf"^engine engine-0: {url} cannot be reached: .*refused"):
        engine.start(SimpleQueue())


# --- what a server refuses --------------------------------------------------------------------------------------------


def post(url: str, path: str, body: bytes, **headers: str) -> httpx.Response:
    return httpx.post(url + path, content=body, headers={"Content-Type": CONTENT_TYPE} | headers, trust_env=False)


def test_nothing_is_changed_without_the_token(servers, folder: Path, tmp_path: Path, monkeypatch) -> None:
    there = servers(token="secret")
    monkeypatch.setenv("TOKEN", "secret")
    (engine,) = engines_of(there.rollout(server_token_env="TOKEN"), folder / "p0", tmp_path)
    engine.start(SimpleQueue())
    assert isinstance(engine, RemoteEngine) and engine._link is not None
    session = engine._link.session  # even who knows it
    before = {name: tensor.clone() for name, tensor in there.up[0].host.engine.views.items()}  # type: ignore[attr-defined]
    slot = TensorSlot("lm_head.weight", "float32", before["lm_head.weight"].shape, 0)
    head = encode([session, [slot]])
    chunk = len(head).to_bytes(HEAD, "big") + head + bytes(before["lm_head.weight"].numel() * 4)
    for path, body in (
        ("/connect", encode(engine.hello)),
        ("/calls", encode([session, 1, [Call(1, "begin_update", (1,))]])),
        ("/weights", chunk),
        ("/events", encode([session, 0])),
        ("/leave", encode([session])),
    ):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret2"}):
            answer = post(there.urls[0], path, body, **headers)
            assert answer.status_code == 401 and "token" in answer.text, path
    assert engine.health().version == 0
    assert post(there.urls[0], "/weights", chunk, Authorization="Bearer secret").status_code == 422  # no update was begun
    for name, tensor in there.up[0].host.engine.views.items():  # type: ignore[attr-defined]
        assert torch.equal(tensor, before[name])
    assert httpx.get(f"{there.urls[0]}/health", trust_env=False).json()["state"] == "ready"
    # A body that is not read is no second request, whatever it looks like.
    host, port = there.urls[0].removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as stranger:
        hidden = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
        stranger.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(hidden) + hidden)
        answers = b"".join(iter(lambda: stranger.recv(1 << 16), b""))
    assert answers.count(b"HTTP/1.1 ") == 1
    engine.close()


def test_a_wrong_token_is_one_line_at_the_learner(servers, folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TOKEN", "other")
    (engine,) = engines_of(servers(token="secret").rollout(server_token_env="TOKEN"), folder / "p0", tmp_path)
    with pytest.raises(InputError, match=r"needs the token .* rollout\.server_token_env$"):
        engine.start(SimpleQueue())


def test_a_page_in_a_browser_cannot_send_what_a_server_takes(servers) -> None:
    there = servers()
    answer = httpx.post(f"{there.urls[0]}/leave", content=encode(["x"]), headers={"Content-Type": "text/plain"}, trust_env=False)
    assert answer.status_code == 415


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is repaired is vLLM's on a CPU")
def test_what_hosts_had_to_repair_is_said_where_the_run_was_started_and_once(servers, folder: Path, tmp_path: Path) -> None:
    latent = policies.tiny_deepseek_v3(tmp_path / "latent", seed=0, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rl.engines.make, "Host", lambda *given: given)  # which would begin to load
        given: Any = make_host(RolloutConfig(engine="vllm"), PolicyConfig(path=str(latent)), 64, tmp_path / "work")
    line = given[-1][0]
    assert "rotary_embedding runs without it" in line
    there = servers(2)
    for server in there.up:
        server.host.says = (line,)
    said: list[str] = []
    policy = folder / "p0"
    for engine in make_engines(there.rollout(), PolicyConfig(path=str(policy)), policy, 64, tmp_path, returns_routes=True, say=said.append):
        engine.start(SimpleQueue())
        engine.close()
    assert said == [line]


def test_a_half_sent_update_touches_nothing(servers, folder: Path, tmp_path: Path) -> None:
    there = servers()
    (engine,) = engines_of(there.rollout(), folder / "p0", tmp_path)
    mailbox: SimpleQueue[Any] = SimpleQueue()
    engine.start(mailbox)
    sync = WeightSync([engine], read_manifest(folder / "p0"))
    assert sync.file is not None
    sync.file.write(policies.Checkpoint(folder / "p1").export())
    (chunk,) = sync.file.chunks
    views = there.up[0].host.engine.views  # type: ignore[attr-defined]
    before = {name: tensor.clone() for name, tensor in views.items()}
    engine.begin_update(1)
    engine.load(replace(chunk, slots=chunk.slots[:-1]))
    # The last tensor breaks off in the middle.
    assert isinstance(engine, RemoteEngine) and engine._link is not None
    head = encode([engine._link.session, [chunk.slots[-1]]])
    host, port = there.up[0].server_address[:2]
    with socket.create_connection((str(host), int(port))) as half:
        size = HEAD + len(head) + 4 * int(np.prod(chunk.slots[-1].shape))
        lines = f"POST /weights HTTP/1.1\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: {size}\r\n\r\n"
        half.sendall(lines.encode() + len(head).to_bytes(HEAD, "big") + head + b"\0" * 100)
    with pytest.raises(EngineDead, match=rf"1 of {len(before)} tensors did not come, first {chunk.slots[-1].name}"):
        engine.end_update()
    assert all(torch.equal(views[name], before[name]) for name in before)
    assert isinstance(mailbox.get(timeout=5), Died)
    engine.start(mailbox)  # another life, and the whole update
    sync.push(policies.Checkpoint(folder / "p1"), version=1)
    assert engine.health().version == 1 and not torch.equal(views["lm_head.weight"], before["lm_head.weight"])
    engine.close()
    sync.close()


def test_an_engine_samples_while_its_update_crosses_and_a_life_that_did_not_get_it_does_not_take_it(
    servers, folder: Path, tmp_path: Path
) -> None:
    there = servers()
    (engine,) = engines_of(there.rollout(), folder / "p0", tmp_path)
    mailbox: SimpleQueue[Any] = SimpleQueue()
    engine.start(mailbox)
    sync = WeightSync([engine], read_manifest(folder / "p0"))
    assert sync.file is not None and isinstance(engine, RemoteEngine)
    sync.file.write(policies.Checkpoint(folder / "p1").export())
    engine.submit([Request("p", "p#g", 0, 0, 0, np.arange(4, dtype=np.int32), Sampling(max_tokens=TOKENS))])
    engine.bring(1, sync.file.chunks)
    while not isinstance(event := mailbox.get(timeout=10), Finished):
        pass
    assert set(event.completion.policy_version.tolist()) == {0}  # it was never stopped for it
    there.lose(0)
    assert isinstance(mailbox.get(timeout=10), Died)
    there.start_again(0)
    engine.start(mailbox)
    with pytest.raises(EngineDead, match="began another life in the middle of an update"):
        engine.end_update()
    assert engine.health().version == 0 and engine.health().alive

    @contextmanager
    def another_life(version: int) -> Iterator[None]:
        there.lose(0)
        while not isinstance(mailbox.get(timeout=10), Died):
            pass
        there.start_again(0)
        engine.start(mailbox)
        yield

    sync.standing_still = another_life
    sync.push(policies.Checkpoint(folder / "p1"), version=1)  # passes it over
    assert engine.health().version == 0
    sync.replay(engine)
    assert engine.health().version == 1
    engine.close()
    sync.close()


@pytest.mark.parametrize(
    ("slot", "line"),
    [
        (TensorSlot("lm_head.bias", "float32", (64,), 0), "no tensor of this name"),
        (TensorSlot("lm_head.weight", "bfloat16", (64, 128), 0), r"float32 \(64, 128\)"),
        (TensorSlot("lm_head.weight", "float32", (128, 64), 0), r"float32 \(64, 128\)"),
    ],
)
def test_tensors_that_are_not_the_policys_are_refused(servers, folder: Path, tmp_path: Path, slot: TensorSlot, line: str) -> None:
    (engine,) = engines_of(servers().rollout(), folder / "p0", tmp_path)
    engine.start(SimpleQueue())
    engine.begin_update(1)
    blob = tmp_path / "blob"
    blob.write_bytes(bytes(1 << 16))
    with pytest.raises(EngineDead, match=f"weight update: {slot.name} came as .*has {line}"):
        engine.load(rl.engines.base.WeightChunk(str(blob), (slot,)))
    engine.close()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"policy": PolicyConfig(path="OTHER")}, "its policy is .{12}…, the learner's .{12}…"),
        ({"policy": PolicyConfig(path="SAME", precision="bf16")}, "its precision is fp32, the learner's bf16"),
        ({"returns_routes": False}, "its routes is returned, the learner's not returned"),
    ],
)
def test_an_engine_of_another_policy_is_refused(servers, folder: Path, tmp_path: Path, change: dict[str, Any], line: str) -> None:
    there = servers()
    policy = change.get("policy", PolicyConfig(path="SAME"))
    path = folder / ("p1" if policy.path == "OTHER" else "p0")
    policy = policy.model_copy(update={"path": str(path)})
    routes = change.get("returns_routes", True)
    (engine,) = make_engines(there.rollout(), policy, path, 64, tmp_path, returns_routes=routes, manifest=read_manifest(path))
    with pytest.raises(InputError, match=rf"^engine engine-0: {there.urls[0]}: {line}; serve it with the learner's recipe and policy$"):
        engine.start(SimpleQueue())


def test_a_tokenizer_that_differs_is_refused(servers, folder: Path, tmp_path: Path) -> None:
    import shutil

    there = servers()
    other = shutil.copytree(folder / "p0", tmp_path / "other")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"A"', '"~"'))
    (engine,) = engines_of(there.rollout(), other, tmp_path)
    with pytest.raises(InputError, match="its tokenizer is"):
        engine.start(SimpleQueue())


def test_a_server_has_one_learner_at_a_time_until_that_is_gone(servers, folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(rl.engines.host, "LOST_s", 0.1)
    there = servers()
    (first,), (second,) = (engines_of(there.rollout(), folder / "p0", tmp_path) for _ in range(2))
    assert isinstance(first, RemoteEngine)
    session = decode(post(there.urls[0], "/connect", encode(first.hello)).content).session
    body = encode([session, 1000])
    ask = f"POST /events HTTP/1.1\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    place = tuple(there.up[0].server_address[:2])
    with socket.create_connection(place) as asking:  # as the first learner does all the time
        asking.sendall(ask)
        with pytest.raises(InputError, match=rf"samples for process {psutil.Process().pid} on .* now, and for one learner at a time"):
            second.start(SimpleQueue())
        assert f"process {psutil.Process().pid} on" in httpx.get(f"{there.urls[0]}/health", trust_env=False).json()["owner"]
    # Its process died while it asked: the kernel closed the connection, and nobody said goodbye.
    with socket.create_connection(place) as asking:
        asking.sendall(ask)
        time.sleep(0.5)
    monkeypatch.setattr(rl.engines.remote, "FIRST_s", 10.0)
    began = time.monotonic()
    second.start(SimpleQueue())
    assert time.monotonic() - began < 8.0  # and not after the lease
    health = second.health()
    assert (health.version, health.tokens, health.running) == (0, 0, 0)  # a life of its own
    with pytest.raises(EngineDead):
        first.transport.calls(session, 1, [Call(1, "health", ())])
    second.close()


# --- the command ------------------------------------------------------------------------------------------------------


def serve(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("sys.argv", ["rl.serve", *arguments])
    return rl.serve.main()


@pytest.fixture
def recipe(folder: Path, tmp_path: Path) -> str:
    """A learner's recipe, most of which is none of the server's business."""
    path = tmp_path / "recipe.yaml"
    path.write_text(f"run: {{name: x}}\npolicy: {{path: {folder / 'p0'}}}\nrollout: {{engine: hf, slots: 8}}\nrewards: {{parts: []}}\n")
    return str(path)


def test_beyond_loopback_a_token_is_needed(recipe: str, monkeypatch, capsys) -> None:
    for host in ("0.0.0.0", "::", socket.gethostname()):
        if host == "::" and not socket.has_ipv6:
            continue
        if host == socket.gethostname() and all(i[4][0].startswith(("127.", "::1")) for i in socket.getaddrinfo(host, None)):
            continue
        assert serve([recipe, "--host", host, "--port", "0"], monkeypatch) == 2
        out = capsys.readouterr()
        assert out.err.count("\n") == 1 and f"--host: {host} can be reached" in out.err and "rollout.server_token_env" in out.err
    monkeypatch.setenv("TOKEN", "secret")
    assert serve([recipe, "--host", "0.0.0.0", "--port", "0", "--dry-run", "rollout.server_token_env=TOKEN"], monkeypatch) == 0
    assert "a token is asked for" in capsys.readouterr().out


def test_a_token_variable_that_is_not_set_is_one_line(recipe: str, monkeypatch, capsys) -> None:
    monkeypatch.delenv("TOKEN", raising=False)
    assert serve([recipe, "rollout.server_token_env=TOKEN"], monkeypatch) == 2
    assert capsys.readouterr().err == "rollout.server_token_env: no environment variable TOKEN; set it to the servers' token\n"


def test_a_port_in_use_is_one_line(recipe: str, monkeypatch, capsys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert serve([recipe, "--port", str(port)], monkeypatch) == 2
    assert capsys.readouterr().err == f"--port: {port} on 127.0.0.1 is in use; choose another one, or end what listens there\n"


def test_a_dry_run_counts_no_engine_here(monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.chdir(CHECKOUT)
    overrides = ["rollout.weights=file", "rollout.servers=[http://a:8400, http://b:8400]", f"run.output_dir={tmp_path}"]
    monkeypatch.setattr("sys.argv", ["rl.train", "recipes/gsm8k_8gpu.yaml", "--dry-run", *overrides])
    assert rl.train.main() == 0
    out = capsys.readouterr().out
    assert "8 of 8 GPUs learn" in out and "GPUs sample" not in out
    assert "engines: http://a:8400, http://b:8400; their memory" in out
    assert "vllm is not installed" not in out


# --- values -----------------------------------------------------------------------------------------------------------


def test_values_cross_byte_for_byte() -> None:
    prompt = np.arange(5, dtype=np.int32)
    logp = np.array([-0.0, np.nan, np.inf, -1e-30], np.float32)
    requests = [Request("p", "g", 0, i, 2**63 + i, prompt, Sampling(4, 0.7, ("\n", "é"))) for i in range(3)]
    completion = Completion(
        "p", "g", 1, 0, 7, prompt[1:], np.ones(4, np.uint8), logp, np.zeros(4, np.int32), "stop", "e",
        np.arange(24, dtype=np.int16).reshape(3, 4, 2), np.array([True, False, True]),
    )  # fmt: skip
    sent = {
        "requests": requests,
        "event": Finished("e", completion),
        "x": (1, None, [1.5e-300, "a\nb"]),
        "spec": TensorSpec("float32", (2, 3)),
    }
    message = encode(sent)
    got = decode(message)
    assert got["requests"][0].sampling == requests[0].sampling and got["requests"][2].seed == 2**63 + 2
    assert got["x"] == sent["x"] and got["spec"] == sent["spec"]
    assert_same({"c": got["event"].completion}, {"c": completion})
    assert message.count(prompt.tobytes()) == 1  # the prompt of a group travels once


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"{}",
        b"[1]\nx",
        b'{"System": {}}\n',
        b'{"array": ["|O", [1]]}\n12345678',
        b'{"array": ["<i4", [-1]]}\n',
        b'{"array": ["<f4", [2]]}\n1234',
    ],
)
def test_what_is_no_message_is_refused(message: bytes) -> None:
    with pytest.raises(Malformed):
        decode(message)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"servers": ["localhost:8400"]}, "'localhost:8400' is no address of a server; write http://host:port"),
        ({"servers": ["http://a:1", "http://a:1"]}, "'http://a:1' stands twice"),
        ({"servers": ["http://a:1", "http://b:1"], "engines": 3}, "engines 3, and there are 2 servers"),
        ({"servers": ["http://a:1"], "placement": "ray"}, "servers are where they were started"),
        ({"servers": ["http://a:1"], "weights": "nccl"}, "weights nccl goes to engines of this machine"),
    ],
)
def test_mistakes_with_servers_are_said(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        RolloutConfig(**changes)

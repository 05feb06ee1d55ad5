"""The door in front of an engine: nobody without the secret, never more than its slots."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from serving.engine import door as door_module
from serving.engine.door import CLAIM_S, CLOSE_PATH, STATUS_PATH, Door

SECRET = "door-secret"
CHAT = "/v1/chat/completions"


class Engine:
    """An app that counts who is inside and lets them out on a word."""

    def __init__(self) -> None:
        self.inside = self.most = 0
        self.go = asyncio.Event()
        self.state: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.inside += 1
        self.most = max(self.most, self.inside)
        try:
            await self.go.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"{}"})
        finally:
            self.inside -= 1


Made = Callable[..., tuple[Door, Engine]]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Made:
    def made(slots: int = 2) -> tuple[Door, Engine]:
        monkeypatch.setenv("STEELYARD_DOOR_SECRET", SECRET)
        monkeypatch.setenv("STEELYARD_DOOR_SLOTS", str(slots))
        engine = Engine()
        return Door(engine), engine

    return made


async def ask(
    door: Door,
    path: str = CHAT,
    method: str = "POST",
    secret: str | None = SECRET,
    kind: str = "http",
    tokens: str | None = None,
    trial: str | None = None,
    app: Any = None,
) -> tuple[Any, dict[bytes, bytes], Any]:
    """Status (or the message's type), headers and JSON body of the answer."""
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    headers = [] if secret is None else [(b"x-steelyard-secret", secret.encode())]
    if tokens is not None:
        headers.append((b"x-steelyard-tokens", tokens.encode()))
    if trial is not None:
        headers.append((b"x-steelyard-trial", trial.encode()))
    path, _, query = path.partition("?")
    scope = {"type": kind, "path": path, "query_string": query.encode(), "headers": headers} | (
        {"method": method, "app": app} if kind == "http" else {}
    )
    await door(scope, receive, send)
    body = b"".join(m.get("body", b"") for m in sent[1:])
    return sent[0].get("status", sent[0]["type"]), dict(sent[0].get("headers", [])), json.loads(body or b"null")


async def status(door: Door) -> dict[str, int]:
    return dict((await ask(door, STATUS_PATH, "GET"))[2])


def test_an_engine_without_its_secret_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STEELYARD_DOOR_SECRET", raising=False)
    with pytest.raises(RuntimeError, match="without its door's secret"):
        Door(lambda *_: asyncio.sleep(0))


@pytest.mark.parametrize("secret", [None, "", "door-secre", "door-secret ", "Door-secret", "dör"])
@pytest.mark.parametrize("path", [CHAT, "/health", "/metrics", STATUS_PATH, "/v1/load_lora_adapter"])
async def test_every_path_needs_the_secret(make: Made, path: str, secret: str | None) -> None:
    door, engine = make()
    code, _, body = await ask(door, path, secret=secret)
    assert (code, body["error"]["code"], engine.most) == (401, "no_secret", 0)


async def test_a_websocket_without_the_secret_is_closed(make: Made) -> None:
    door, engine = make()
    assert (await ask(door, "/v1/realtime", secret=None, kind="websocket"))[0] == "websocket.close"
    assert engine.most == 0


async def test_one_more_than_the_slots_is_busy_at_once(make: Made) -> None:
    door, engine = make(slots=2)
    inside = [asyncio.create_task(ask(door)) for _ in range(2)]
    await asyncio.sleep(0)
    code, headers, _ = await ask(door)
    assert (code, headers[b"x-steelyard-busy"]) == (503, b"1")
    assert (await status(door))["refused"] == 1
    engine.go.set()
    assert [(await task)[0] for task in inside] == [200, 200]
    assert (await ask(door))[0] == 200
    assert ((await status(door))["in_flight"], engine.most) == (0, 2)


async def test_a_client_that_leaves_frees_its_slot(make: Made) -> None:
    door, _ = make(slots=1)
    task = asyncio.create_task(ask(door))
    await asyncio.sleep(0)
    assert (await status(door))["in_flight"] == 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert (await status(door))["in_flight"] == 0


@pytest.mark.parametrize(
    "path", [CHAT, "/v1/messages", "/v1/embeddings", "/pooling", "/classify", "/rerank", "/v2/rerank"]
)
async def test_whatever_runs_the_model_takes_a_slot(make: Made, path: str) -> None:
    door, _ = make(slots=0)
    assert (await ask(door, path))[0] == 503


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/health"), ("GET", "/metrics"), ("GET", "/v1/models"), ("POST", "/tokenize"), ("POST", "/sleep"),
     ("POST", "/v1/messages/count_tokens"), ("GET", STATUS_PATH)],
)  # fmt: skip
async def test_what_does_not_passes_a_full_door(make: Made, method: str, path: str) -> None:
    door, engine = make(slots=0)
    engine.go.set()
    assert (await ask(door, path, method))[0] == 200


async def test_the_lifespan_passes(make: Made) -> None:
    door, engine = make()
    engine.go.set()
    await ask(door, kind="lifespan", secret=None)
    assert engine.most == 1


async def test_a_dead_engine_is_busy_for_newcomers(make: Made) -> None:
    """Its server would tell them what it tells those inside, who may have been the reason."""
    door, engine = make()
    engine.go.set()
    engine.state = SimpleNamespace(engine_client=SimpleNamespace(errored=False))
    assert (await ask(door, app=engine))[0] == 200
    engine.state.engine_client.errored = True
    status_, headers, _ = await ask(door, app=engine)
    assert (status_, headers[b"x-steelyard-busy"]) == (503, b"1")


async def test_a_closed_door_lets_nobody_in_and_those_inside_finish(make: Made) -> None:
    door, engine = make()
    inside = asyncio.create_task(ask(door))
    while not engine.inside:
        await asyncio.sleep(0)
    assert (await ask(door, CLOSE_PATH))[0] == 200
    status, headers, _ = await ask(door)
    assert (status, headers[b"x-steelyard-busy"]) == (503, b"1")
    engine.go.set()
    assert (await inside)[0] == 200
    assert (await ask(door, CLOSE_PATH, secret="other"))[0] == 401


# -- KV cache


async def inside(door: Door, tokens: int) -> asyncio.Task[Any]:
    """A generation that says it takes so many tokens, and was let in."""
    task = asyncio.create_task(ask(door, tokens=str(tokens)))
    await asyncio.sleep(0)
    assert not task.done()
    return task


@pytest.fixture
async def room(make: Made) -> tuple[Door, Engine]:
    """A door with many slots that was told of 100 tokens."""
    door, engine = make(slots=50)
    assert (await ask(door, f"{STATUS_PATH}?tokens=100"))[2]["budget"] == 100
    return door, engine


async def test_what_does_not_fit_beside_those_inside_is_busy(room: tuple[Door, Engine]) -> None:
    door, engine = room
    first = await inside(door, 60)
    code, headers, _ = await ask(door, tokens="41")
    assert (code, headers[b"x-steelyard-busy"]) == (503, b"1")
    assert (await status(door))["tokens"] == 60
    engine.go.set()
    await first
    assert ((await ask(door, tokens="100"))[0], (await status(door))["tokens"]) == (200, 0)


async def test_what_is_larger_than_the_whole_cache_goes_alone(room: tuple[Door, Engine]) -> None:
    door, _ = room
    alone = await inside(door, 5000)
    assert (await ask(door, tokens="1"))[0] == 503
    alone.cancel()
    await asyncio.gather(alone, return_exceptions=True)
    assert (await status(door))["tokens"] == 0


async def test_small_ones_do_not_keep_a_large_one_out_for_ever(
    room: tuple[Door, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    door, _ = room
    now = 100.0
    monkeypatch.setattr(door_module.time, "monotonic", lambda: now)
    small = [await inside(door, 30) for _ in range(3)]
    assert (await ask(door, tokens="80"))[0] == 503
    assert (await ask(door, tokens="5"))[0] == 503, "a smaller one is before the one that waits"
    for task in small:
        task.cancel()
    await asyncio.gather(*small, return_exceptions=True)
    large = await inside(door, 80)
    assert await inside(door, 5), "it is in, so nothing is kept any more"
    assert (await ask(door, tokens="90"))[0] == 503
    now += CLAIM_S
    assert await inside(door, 5), "the one that was refused did not come back"
    large.cancel()


@pytest.mark.parametrize("tokens", [None, "", "-5", "many", "1e9", "9" * 40, "٣"])
async def test_who_says_nothing_sensible_takes_a_slot_alone(room: tuple[Door, Engine], tokens: str | None) -> None:
    door, engine = room
    engine.go.set()
    assert (await ask(door, tokens=tokens))[0] == 200
    assert (await status(door))["tokens"] == 0


@pytest.mark.parametrize("query", ["", "tokens=", "tokens=-1", "tokens=x", "slots=5", "tokens=" + "9" * 30])
async def test_a_budget_that_is_none_changes_nothing(room: tuple[Door, Engine], query: str) -> None:
    assert (await ask(room[0], f"{STATUS_PATH}?{query}"))[2]["budget"] == 100


async def test_the_budget_is_told_with_the_secret_only(room: tuple[Door, Engine]) -> None:
    door, _ = room
    assert (await ask(door, f"{STATUS_PATH}?tokens=1", secret="wrong"))[0] == 401
    assert (await status(door))["budget"] == 100


# -- those under suspicion


async def test_one_is_on_trial_at_a_time_and_whoever_is_not_passes(make: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    door, engine = make(slots=50)
    now = 100.0
    monkeypatch.setattr(door_module.time, "monotonic", lambda: now)
    first = asyncio.create_task(ask(door, trial="250"))
    await asyncio.sleep(0)
    code, headers, _ = await ask(door, trial="250")
    assert (code, headers[b"x-steelyard-busy"]) == (503, b"trial")
    beside = asyncio.create_task(ask(door))
    now += 0.25
    second = asyncio.create_task(ask(door, trial="250"))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert (await ask(door, trial="250"))[0] == 503, "the first one's end is not the second one's"
    assert (await status(door))["in_flight"] == 2
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    engine.go.set()
    assert (await ask(door, trial="250"))[0] == (await beside)[0] == 200
    assert (await status(door))["refused"] == 0, "the slots were free"


async def test_a_trial_is_over_when_the_answer_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEELYARD_DOOR_SECRET", SECRET)
    begin, end = asyncio.Event(), asyncio.Event()

    async def stream(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"", "more_body": True})
        await begin.wait()
        await send({"type": "http.response.body", "body": b"1", "more_body": True})
        await end.wait()
        await send({"type": "http.response.body", "body": b"2"})

    door = Door(stream)
    first = asyncio.create_task(ask(door, trial="60000"))
    await asyncio.sleep(0)
    assert (await ask(door, trial="60000"))[0] == 503, "headers are no answer"
    begin.set()
    while door._trial is not None:
        await asyncio.sleep(0)
    second = asyncio.create_task(ask(door, trial="60000"))
    await asyncio.sleep(0)
    assert (await status(door))["in_flight"] == 2
    end.set()
    assert (await first)[0] == (await second)[0] == 200

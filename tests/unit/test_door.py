"""The door in front of an engine: nobody without the secret, never more than its slots."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from serving.engine.door import CLOSE_PATH, STATUS_PATH, Door

SECRET = "door-secret"
CHAT = "/v1/chat/completions"


class Engine:
    """An app that counts who is inside and lets them out on a word."""

    def __init__(self) -> None:
        self.inside = self.most = 0
        self.go = asyncio.Event()

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
    door: Door, path: str = CHAT, method: str = "POST", secret: str | None = SECRET, kind: str = "http"
) -> tuple[Any, dict[bytes, bytes], Any]:
    """Status (or the message's type), headers and JSON body of the answer."""
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    headers = [] if secret is None else [(b"x-steelyard-secret", secret.encode())]
    scope = {"type": kind, "path": path, "headers": headers} | ({"method": method} if kind == "http" else {})
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

"""The door: the outermost ASGI layer inside the engine's process.

It demands the cluster secret on every path, health and metrics included (vLLM's own `--api-key` guards some prefixes
only), and lets at most `slots` generations in: the next one gets an immediate 503 with `x-steelyard-busy: 1`, so that
the limit is exact however many gateways there are, and a gateway that guessed wrong loses a millisecond, not its place.
Of those that may be the reason why an engine died it tries one at a time: the next one is told `x-steelyard-busy: trial`.

Runs inside the engine, so: standard library only, and it reads its own three variables from the environment
(`STEELYARD_DOOR_SECRET`, `STEELYARD_DOOR_SLOTS`). Given to vLLM as `--middleware serving.engine.door.Door`.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

SECRET_HEADER = b"x-steelyard-secret"
BUSY_HEADER = b"x-steelyard-busy"
TOKENS_HEADER = b"x-steelyard-tokens"
PROBE_HEADER = b"x-steelyard-probe"  # whether the engine generates: takes no slot and is no load
# Milliseconds for which no other request with this header comes in, unless its answer begins before.
TRIAL_HEADER = b"x-steelyard-trial"
TRIAL_MOST_S = 60.0
STATUS_PATH = "/-/door"
CLOSE_PATH = "/-/door/close"  # POST: nothing more comes in; what is inside ends
# A request that was refused for its size keeps smaller ones out for this long, until it tries again: else it would wait for
# as long as there are smaller ones.
CLAIM_S = 0.15

# Everything that runs the model takes a slot; what only counts tokens does not.
_TAKES_SLOT = ("/v1/", "/pooling", "/classify", "/score", "/rerank", "/v2/rerank")
_FREE = frozenset({"/v1/messages/count_tokens"})


class Door:
    """Wraps the engine's app. `in_flight` counts generations between request and last byte or disconnect."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        secret = os.environ.get("STEELYARD_DOOR_SECRET", "")
        if not secret:
            raise RuntimeError("STEELYARD_DOOR_SECRET is not set: an engine without its door's secret does not start")
        self.app = app
        self.slots = int(os.environ.get("STEELYARD_DOOR_SLOTS", "256"))
        self.in_flight = 0
        self.entered = 0  # ever
        self.refused = 0
        self.budget = 0  # tokens of KV cache; 0: not known, so not enforced
        self.tokens = 0  # that those inside may take
        self._claim, self._claim_until = 0, 0.0  # tokens of the largest that waits for room, monotonic seconds
        self._trial: object | None = None  # who is on trial, and until when at most, monotonic seconds
        self._trial_until = 0.0
        self._secret = secret.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        given = tokens = probe = trial = b""
        for name, value in scope["headers"]:
            if name == SECRET_HEADER:
                given = value
            elif name == TOKENS_HEADER:
                tokens = value
            elif name == PROBE_HEADER:
                probe = value
            elif name == TRIAL_HEADER:
                trial = value
        if not hmac.compare_digest(given, self._secret):
            await self._refuse(scope, send)
            return
        path: str = scope["path"]
        if path == STATUS_PATH:
            if scope.get("method") == "POST":
                self._learn_budget(scope.get("query_string", b""))
            await _answer(
                send,
                200,
                {"in_flight": self.in_flight, "slots": self.slots, "tokens": self.tokens, "budget": self.budget}
                | {"entered": self.entered, "refused": self.refused, "pid": os.getpid()},
            )
        elif scope.get("method") == "POST" and path == CLOSE_PATH:
            self.slots = 0  # `busy` from now on: gateways that have not heard of the drain yet try elsewhere
            await _answer(send, 200, {"in_flight": self.in_flight})
        elif scope.get("method") == "POST" and path.startswith(_TAKES_SLOT) and path not in _FREE and not probe:
            await self._through(scope, receive, send, _number(tokens), _number(trial))
        else:
            await self.app(scope, receive, send)

    async def _through(self, scope: Scope, receive: Receive, send: Send, tokens: int, trial_ms: int) -> None:
        if trial_ms and self._trial is not None and time.monotonic() < self._trial_until:
            await _answer(send, 503, {"error": {"message": "another is on trial", "code": "busy"}}, busy=b"trial")
        elif self.in_flight >= self.slots or _dead(scope) or not self._fits(tokens):
            self.refused += 1
            await _answer(send, 503, {"error": {"message": "all slots are taken", "code": "busy"}}, busy=b"1")
        elif trial_ms:
            await self._alone(scope, receive, send, tokens, trial_ms)
        else:
            await self._inside(scope, receive, send, tokens)

    async def _alone(self, scope: Scope, receive: Receive, send: Send, tokens: int, trial_ms: int) -> None:
        """The engine may die of it: no other such one is let in until its answer begins, or its time is up."""
        me = self._trial = object()
        self._trial_until = time.monotonic() + min(trial_ms / 1e3, TRIAL_MOST_S)

        def over() -> None:
            if self._trial is me:
                self._trial = None

        async def until_answered(message: MutableMapping[str, Any]) -> None:
            await send(message)
            if message.get("body"):
                over()

        async def told() -> MutableMapping[str, Any]:
            message = await receive()  # the server says `100 Continue` here, by which the gateway knows that it is in
            await asyncio.sleep(0)  # uvloop writes at the end of its round: before the engine can die of it
            return message

        try:
            await self._inside(scope, told, until_answered, tokens)
        finally:
            over()

    async def _inside(self, scope: Scope, receive: Receive, send: Send, tokens: int) -> None:
        self.in_flight += 1
        self.entered += 1
        self.tokens += tokens
        try:
            await self.app(scope, receive, send)
        finally:
            self.in_flight -= 1
            self.tokens -= tokens

    def _fits(self, tokens: int) -> bool:
        """Whether the KV cache has room. What is larger than all of it goes alone: the estimate may be wrong, and if it is
        not, the engine has the say."""
        if not self.budget or not tokens:
            return True
        now = time.monotonic()
        if now >= self._claim_until:
            self._claim = 0
        if tokens >= self._claim:
            if not self.in_flight or self.tokens + tokens <= self.budget:
                self._claim = 0
                return True
            self._claim, self._claim_until = tokens, now + CLAIM_S
        return False

    def _learn_budget(self, query: bytes) -> None:
        name, _, value = query.partition(b"=")
        if name == b"tokens" and value.isdigit() and len(value) < 16:
            self.budget = int(value)

    async def _refuse(self, scope: Scope, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await _answer(
                send, 401, {"error": {"message": "this engine answers its gateways only", "code": "no_secret"}}
            )


def _dead(scope: Scope) -> bool:
    """Whether the engine behind the server has died, as vLLM's own server asks. It would say so to whoever comes now, in the
    same words as to those who were inside: only those may have been the reason."""
    engine = getattr(getattr(scope.get("app"), "state", None), "engine_client", None)
    return bool(getattr(engine, "errored", False))


def _number(value: bytes) -> int:
    """0 for what is none."""
    return int(value) if value.isdigit() and len(value) < 16 else 0


async def _answer(send: Send, status: int, body: dict[str, Any], busy: bytes = b"") -> None:
    data = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    if busy:
        headers.append((BUSY_HEADER, busy))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})

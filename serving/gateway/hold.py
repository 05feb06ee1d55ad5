"""A stream that is held long: its 200 leaves early, and keep-alives in its dialect, so that nobody between takes it for
dead. From then on a failure is an event in the stream."""

from __future__ import annotations

import asyncio
from types import TracebackType

from serving.gateway.exchange import Exchange

EVERY_S = 15.0
EVENT_STREAM = b"text/event-stream; charset=utf-8"
NO_CACHE = [(b"cache-control", b"no-cache")]
_PING = {"openai": b": keep-alive\n\n", "anthropic": b'event: ping\ndata: {"type": "ping"}\n\n'}


class KeepAlive:
    """One per request, and `async with keep_alive: ...` around each of its waits for a slot: the waits count together,
    what lies between them, at an engine, does not. `after_s` None: the client opted out. Nothing is sent any more once a
    block was left."""

    def __init__(self, x: Exchange, after_s: float | None) -> None:
        self._x = x
        self._left_s = after_s  # of waiting, until the next frame
        self._entered = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> None:
        if self._left_s is not None:
            loop = asyncio.get_running_loop()
            self._entered = loop.time()
            self._timer = loop.call_later(self._left_s, self._begin)

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._timer is None or self._left_s is None:
            return
        self._timer.cancel()
        self._left_s = max(0.0, self._left_s - (asyncio.get_running_loop().time() - self._entered))
        task, self._task = self._task, None
        if task is not None:
            task.cancel()  # between two frames, or in one that waits for the client to read: never in mid-frame
            # Not `await task`: its cancellation and one of the request itself could not be told apart.
            await asyncio.wait([task])
            if not task.cancelled():
                task.exception()  # the client is gone; whoever sends next finds out

    def _begin(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._speak())

    async def _speak(self) -> None:
        if not self._x.started:
            await self._x.start(200, EVENT_STREAM, NO_CACHE)
        while True:
            slow = self._x.push(_PING[self._x.dialect])
            self._left_s, self._entered = EVERY_S, asyncio.get_running_loop().time()
            if slow is not None:
                await slow
            await asyncio.sleep(EVERY_S)

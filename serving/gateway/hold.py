"""A stream that is held long: its 200 leaves early, and keep-alives in its dialect, so that nobody between takes it for
dead. From then on a failure is an event in the stream."""

from __future__ import annotations

import asyncio
import contextlib
from types import TracebackType

from serving.gateway.exchange import ClientGone, Exchange

EVERY_S = 15.0
EVENT_STREAM = b"text/event-stream; charset=utf-8"
NO_CACHE = [(b"cache-control", b"no-cache")]
_PING = {"openai": b": keep-alive\n\n", "anthropic": b'event: ping\ndata: {"type": "ping"}\n\n'}


class KeepAlive:
    """`async with KeepAlive(x, after_s): ...` around the wait for a slot. None: the client opted out. Nothing is sent
    any more once the block was left."""

    def __init__(self, x: Exchange, after_s: float | None) -> None:
        self._x = x
        self._after_s = after_s
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> None:
        if self._after_s is not None:
            self._timer = asyncio.get_running_loop().call_later(self._after_s, self._begin)

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()  # between two frames, or in one that waits for the client to read: never in mid-frame
            with contextlib.suppress(asyncio.CancelledError, ClientGone, OSError):
                await self._task

    def _begin(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._speak())

    async def _speak(self) -> None:
        if not self._x.started:
            await self._x.start(200, EVENT_STREAM, NO_CACHE)
        while True:
            slow = self._x.push(_PING[self._x.dialect])
            if slow is not None:
                await slow
            await asyncio.sleep(EVERY_S)

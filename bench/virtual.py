"""Time that jumps from one event to the next: minutes of queueing in a second, the same every time."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any
from unittest import mock

from serving.gateway import queue


class _Jumping(selectors.DefaultSelector):
    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise RuntimeError("everybody waits and nothing will happen")
        self.loop.now += max(0.0, timeout)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        selector = _Jumping()
        super().__init__(selector)
        selector.loop = self
        self.now = 1000.0

    def time(self) -> float:
        return self.now


def run(what: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """`what` in virtual time, the gateway's queue included."""
    loop = VirtualLoop()
    with mock.patch.object(queue, "time", SimpleNamespace(monotonic=loop.time)):
        try:
            loop.run_until_complete(what())
        finally:
            loop.close()

"""ASGI middleware for the tests: each writes its name into the answer, so that the order shows."""

from __future__ import annotations

from typing import Any


class First:
    name = b"first"

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def stamped(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-stamp", self.name)]
            await send(message)

        await self.app(scope, receive, stamped)


class Second(First):
    name = b"second"

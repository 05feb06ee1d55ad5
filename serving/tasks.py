"""Work that goes on for as long as its process does."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)

AGAIN_S = 1.0  # after a round that failed
TELL_EVERY_S = 600.0  # of the same trouble


def for_ever(what: str, work: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
    """A task that does `work`, again where it fails: an exception that nobody awaits would end it unseen, and a gateway that
    follows no table any more, or an engine that nobody looks at, serves on as if all were well. Ends when `work` returns.
    `what` is for the log."""
    return asyncio.create_task(_again_and_again(what, work), name=what)


async def _again_and_again(what: str, work: Callable[[], Awaitable[None]]) -> None:
    told, told_at = "", -math.inf
    while True:
        try:
            return await work()
        except Exception as e:
            now = time.monotonic()
            if repr(e) != told or now - told_at > TELL_EVERY_S:  # not a traceback a second for the same trouble
                log.exception("%s failed, and goes on", what)
                told, told_at = repr(e), now
        await asyncio.sleep(AGAIN_S)

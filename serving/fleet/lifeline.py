"""Whether a process is there, by the kernel's word: a connection to its listener, over which nobody says anything, ends with
it. That is at once, where a lease takes seconds. A node that is lost says nothing: there the lease decides.

A connection also ends where a process closes all that stay silent, as gateways do: whoever can be connected again lives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from urllib.parse import urlsplit

CONNECT_S = 2.0
AGAIN_S = 5.0  # after a connection that could not be made, until the next one
AFRESH_S = 0.05  # after one that ended: an ending process closes its connections and its listener in any order


class Lifelines:
    """One to each process of a table. Used from one event loop only."""

    def __init__(self, on_cut: Callable[[str], None]) -> None:
        self._on_cut = on_cut
        self._held: dict[str, tuple[str, asyncio.Task[None]]] = {}

    def hold(self, name: str, url: str) -> None:
        """To what listens at `url`. Called whenever the process has said that it lives: one that was cut is made again."""
        known = self._held.get(name)
        if known is not None and known[0] == url and not known[1].done():
            return
        self.drop(name)
        self._held[name] = url, asyncio.get_running_loop().create_task(self._until_cut(name, url))

    def drop(self, name: str) -> None:
        known = self._held.pop(name, None)
        if known is not None:
            known[1].cancel()

    def keep(self, names: Collection[str]) -> None:
        """No others."""
        for gone in self._held.keys() - names:
            self.drop(gone)

    async def _until_cut(self, name: str, url: str) -> None:
        parts, held = urlsplit(url), False
        while True:
            try:
                async with asyncio.timeout(CONNECT_S):
                    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=1)
            except OSError:  # a TimeoutError is one
                if held:
                    break
                await asyncio.sleep(AGAIN_S)  # nothing was held, so nothing is known
                return
            held = True
            try:
                await reader.read(1)
            except OSError:
                pass
            finally:
                writer.transport.abort()
            await asyncio.sleep(AFRESH_S)
        self._on_cut(name)

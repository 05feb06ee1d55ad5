"""The gateway's listening sockets, and the server on them: uvicorn, with a beginning and an end that lose no connection.

Gateways of a node share a port by SO_REUSEPORT: the kernel gives each connection to one of them before that one accepts it. One
that closes its socket resets all that it was given and has not accepted, so a planned stop accepts them first. Those of a
gateway that is killed go to its siblings only where `net.ipv4.tcp_migrate_req` is 1.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from serving import tasks
from serving.gateway.exchange import Receive, Scope, Send
from serving.gateway.protocol import ClientProtocol

App = Callable[[Scope, Receive, Send], Awaitable[None]]

BACKLOG = 4096
KEEP_ALIVE_S = 75  # of idle client connections
HEAD_TIMEOUT_S = 30.0  # for the whole head of a request; looked at so often, so it may take twice as long
UNREAD_S = 300.0  # that a client may read nothing of an answer's end, when its request is over
LAST_CALL_S = 1.0  # at a planned stop, for whoever is connected and has not said yet what it wants
LOOK_EVERY_S = 0.05  # whether they have

# A client whose machine is gone says nothing. What it left waiting here, and at an engine, is noticed after a minute. Accepted
# sockets inherit this. No TCP_USER_TIMEOUT: it would cut a client that lives and reads slowly.
_VANISHED = {
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE): 1,
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE): 30,
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL): 10,
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT): 3,
}


def listener(host: str, port: int, *, shared: bool) -> socket.socket:
    """A socket that listens; `shared` with others on the same port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    s = socket.socket(family, socket.SOCK_STREAM)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    for option, value in _VANISHED.items():
        s.setsockopt(*option, value)
    s.bind((host, port))
    s.listen(BACKLOG)
    s.setblocking(False)
    return s


class Server(uvicorn.Server):
    """uvicorn without its signal handlers: the process is Ray's. `serve` runs it; `leave` is its planned end."""

    def __init__(self, app: App, *, private: tuple[str, int] | None = None) -> None:
        """`private` is the address where only the stack's own processes connect: at the end nobody there is waited for."""
        super().__init__(
            uvicorn.Config(
                app,
                loop="none",
                http=ClientProtocol,
                ws="none",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_S,
            )
        )
        self._app = app
        self._private = private
        self._sockets: list[socket.socket] = []

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    @property
    def busy(self) -> bool:
        """After `leave`: whether any request is under way, or its answer not with the kernel yet: its client reads slowly."""
        return bool(self.server_state.tasks or self.server_state.connections)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._sockets = sockets or []
        minding = tasks.for_ever("closing on who says nothing", self._close_the_speechless)
        try:
            await super().serve(sockets)
        finally:
            minding.cancel()

    async def leave(self) -> None:
        """Takes no new connection and loses none: what the kernel had given to this process is answered like the rest. Who is
        connected may ask once more for `LAST_CALL_S`; each answer whose head is sent from now on says that it is the last on
        its connection. Returns when nothing more can come in; what is under way goes on (`busy`)."""
        # Nothing may come between: a connection is given to whoever listens at that moment.
        waiting = [c for s in self._sockets for c in _accepted(s)]
        for server in self.servers:
            server.close()
        self.config.loaded_app = self._answer_last
        for open_one in self.server_state.connections:
            open_one.app = self._answer_last  # type: ignore[union-attr]  # httptools' protocol
            if open_one.cycle is not None:  # type: ignore[union-attr]
                open_one.cycle.keep_alive = False  # type: ignore[union-attr]
        loop = asyncio.get_running_loop()
        for connection in waiting:
            with contextlib.suppress(OSError):  # it left meanwhile
                await loop.connect_accepted_socket(self._protocol, connection)
        until = loop.time() + LAST_CALL_S
        while loop.time() < until and any(c.server != self._private for c in self._idle()):
            await asyncio.sleep(LOOK_EVERY_S)
        _close_unless_asked(self._idle())
        await asyncio.sleep(LOOK_EVERY_S)  # what had come by now is read before uvicorn closes all that is idle
        self.should_exit = True

    def _idle(self) -> list[Any]:
        return [c for c in self.server_state.connections if _answered(c) and not c.transport.is_closing()]

    async def _answer_last(self, scope: Scope, receive: Receive, send: Send) -> None:
        cycle: RequestResponseCycle = send.__self__  # type: ignore[attr-defined]
        cycle.keep_alive = False  # uvicorn says so in the answer, and closes after it
        await self._app(scope, receive, send)

    def _protocol(self) -> asyncio.Protocol:
        kind: Any = self.config.http_protocol_class  # as uvicorn makes them for its own listeners
        made: asyncio.Protocol = kind(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)
        return made

    async def _close_the_speechless(self) -> None:
        """uvicorn waits for ever for the head of a request that has begun, for the first one of a connection, and for whoever
        does not read the end of an answer."""
        before: set[Any] = set()
        unread: dict[Any, tuple[int, float]] = {}  # bytes, and since when it is as many
        while True:
            await asyncio.sleep(HEAD_TIMEOUT_S)
            silent = {c for c in self.server_state.connections if _without_head(c)}
            for found in before & silent:
                found.transport.close()
            before = silent
            now = asyncio.get_running_loop().time()
            before_it, unread = unread, {}
            for c in [c for c in self.server_state.connections if _answered(c)]:
                size: int = c.transport.get_write_buffer_size()
                at, since = before_it.get(c, (0, now))
                if size:
                    unread[c] = size, since if size == at else now
                    if now - unread[c][1] >= UNREAD_S:
                        c.transport.abort()


def _answered(connection: Any) -> bool:
    """Between requests, or before the first one."""
    return connection.cycle is None or bool(connection.cycle.response_complete)


def _without_head(connection: Any) -> bool:
    """Between requests, and not for uvicorn's own timer to close."""
    return _answered(connection) and connection.timeout_keep_alive_task is None


def _close_unless_asked(connections: list[Any]) -> None:
    """The kernel resets a connection that is closed with something unread: the client must not lose a request that has come."""
    poll, by_fd = select.poll(), {c.transport.get_extra_info("socket").fileno(): c for c in connections}
    for fd in by_fd:
        poll.register(fd, select.POLLIN)
    unread = {fd for fd, _ in poll.poll(0)}
    for fd, connection in by_fd.items():
        if fd not in unread:
            connection.transport.close()


def _accepted(listening: socket.socket) -> Iterator[socket.socket]:
    """What the kernel holds for this socket."""
    while True:
        try:
            connection, _ = listening.accept()
        except OSError:  # there is no more, or no descriptor for it
            return
        connection.setblocking(False)
        yield connection

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from serving.gateway import routing
from tests.gateway import harness
from tests.gateway.harness import EngineRoom, Front, Keys


def pytest_asyncio_loop_factories(config: Any, item: Any) -> dict[str, Any]:
    """The loop that gateways run on."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys.make(tmp_path_factory.mktemp("keys") / "keys.json")


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineRoom]:
    """Where simulators run until the module's last test."""
    room = EngineRoom(tmp_path_factory.mktemp("engines"))
    yield room
    room.close()


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a refused connection the only engine is tried again soon, for tests in which that is not the point."""
    monkeypatch.setattr(routing, "BROKEN_PAUSE_S", 0.05)


@pytest.fixture
async def front(keys: Keys, tmp_path: Path) -> AsyncIterator[Front]:
    """A gateway with an empty table. When the test has ended, nothing is left of any request."""
    async with harness.front(keys, tmp_path) as front:
        yield front
        await front.rest()


@pytest.fixture
async def gateway(front: Front, room: EngineRoom) -> Front:
    """A gateway in front of tiny@v1, fast."""
    front.serve(room.shared())
    return front

"""What gateways tell each other of what they hold, by way of the directory's table."""

from __future__ import annotations

import asyncio

import pytest

from serving.fleet.endpoint import Endpoint, GatewayInfo, KeyDemand, Snapshot, State
from serving.gateway.queue import Ticket
from serving.gateway.state import BUSY_START_S, TOLD_BEFORE_S, Fleet

LIMITS = {"max_queue": 9, "max_wait_s": 9, "request_timeout_s": 9, "max_body_bytes": 9}
CATALOG = {
    "models": [{"name": "m", "versions": ["v"], "limits": LIMITS}],
    "names": {"m": {"model": "m", "version": "v"}},
}


def fleet(me: str, slots: int = 1) -> Fleet:
    made = Fleet(me)
    made.set_catalog(CATALOG)
    made.set_snapshot(table(slots))
    return made


def table(slots: int, *gateways: GatewayInfo, number: int = 0) -> Snapshot:
    e = Endpoint(id="e", model="m", version="v", url="http://e", state=State.READY, slots=slots)
    return Snapshot(epoch="x", number=number, complete=True, endpoints=(e,), gateways=gateways)


async def test_what_is_held_and_runs_is_told_and_counted_elsewhere() -> None:
    here, there = fleet("here"), fleet("there")
    line = here.lines["m@v"]
    tickets = [Ticket(since=0, key="a") for _ in range(2)]
    await line.take(tickets[0], others=0, max_queue=9, max_wait_s=9)
    held = asyncio.create_task(line.take(tickets[1], others=0, max_queue=9, max_wait_s=9))
    await asyncio.sleep(0)
    told = GatewayInfo(id="here", url="", demand=here.demand())
    assert told.demand == {"m@v": (KeyDemand("a", 1, 1.0, 1, 1),)}
    for other in (here, there):
        other.set_snapshot(table(1, told, number=1))
    assert there.elsewhere("a", None) == there.elsewhere(None, "m") == (2, 1)
    assert there.elsewhere("b", None) == here.elsewhere("a", None) == (0, 0)
    held.cancel()
    await asyncio.gather(held, return_exceptions=True)
    line.release(tickets[0])
    assert here.demand() == {}


def test_a_gateway_counts_itself_where_the_directory_does_not_yet() -> None:
    here = fleet("here")
    here.set_snapshot(table(1, GatewayInfo(id="there", url=""), number=1))
    assert here.lines["m@v"].gateways == 2


async def test_one_that_is_told_of_others_waits_for_its_part_and_no_longer_than_they_ask() -> None:
    here = fleet("here", slots=4)
    line = here.lines["m@v"]
    busy = GatewayInfo(id="there", url="", demand={"m@v": (KeyDemand("b", 1, 1.0, 10, 0),)})
    here.set_snapshot(table(4, busy, number=1))
    asked = [
        asyncio.create_task(line.take(Ticket(since=i, key="a"), others=0, max_queue=9, max_wait_s=9)) for i in range(4)
    ]
    await asyncio.sleep(0)  # each has asked
    assert 2 <= sum(t.done() for t in asked) < 4
    here.set_snapshot(table(4, number=2))
    await asyncio.wait_for(asyncio.gather(*asked), 1)


async def test_who_a_restarted_directory_lacks_yet_counts_until_it_speaks_or_must_have_spoken() -> None:
    now = 0.0
    here = Fleet("here", clock=lambda: now)
    here.set_catalog(CATALOG)
    line = here.lines["m@v"]
    e = Endpoint(id="e", model="m", version="v", url="http://e", state=State.READY, slots=4)
    me = GatewayInfo(id="here", url="")
    idle, busy = (
        GatewayInfo(id="there", url="", demand={"m@v": (KeyDemand("b", 1, 1.0, held, 0),)}) for held in (0, 10)
    )

    def hears(epoch: str, *gateways: GatewayInfo, complete: bool = False) -> None:
        here.set_snapshot(Snapshot(epoch=epoch, number=1, complete=complete, endpoints=(e,), gateways=gateways))

    hears("old", me, busy, complete=True)
    hears("new", me)
    assert [g.id for g in here.gateways] == ["here", "there"] and line.siblings
    assert here.elsewhere(None, "m") == here.elsewhere("b", None) == (10, 1)
    asked = [
        asyncio.create_task(line.take(Ticket(since=i, key="a"), others=0, max_queue=9, max_wait_s=9)) for i in range(4)
    ]
    await asyncio.sleep(0)  # each has asked
    assert 2 <= sum(t.done() for t in asked) < 4, "its share, and what is tried beyond it"
    hears("new", me, idle)
    await asyncio.wait_for(asyncio.gather(*asked), 1)
    assert here.elsewhere("b", None) == (0, 0), "its own word counts"
    hears("new", me)
    assert here.gateways == (me,), "this directory knew it, and says that it has left"

    hears("newer", me, busy)
    hears("newest", me)
    assert len(here.gateways) == 2
    now = TOLD_BEFORE_S
    hears("newest", me)
    assert here.gateways == (me,)

    hears("last but one", me, busy)
    hears("last", me)
    assert len(here.gateways) == 2
    hears("last", me, complete=True)
    assert here.gateways == (me,)


@pytest.mark.parametrize(
    ("state", "node", "began", "waits_until", "starts"),
    [
        (State.STARTING, "here", 990.0, 0.0, True),
        (State.STARTING, "here", 990.0, 1000.0, True),  # its wait is over
        (State.STARTING, "here", 990.0, 1001.0, False),
        (State.STARTING, "there", 990.0, 0.0, False),
        (State.READY, "here", 990.0, 0.0, False),
        (State.STARTING, "here", 1000.0 - BUSY_START_S, 0.0, False),  # it hangs, or only reads
        (State.STARTING, "here", 1000.0 - BUSY_START_S, 999.0, True),  # it has begun a second ago
    ],
)
def test_neither_a_replica_that_waits_after_failed_starts_nor_one_that_hangs_keeps_the_cores_of_its_node(
    state: State, node: str, began: float, waits_until: float, starts: bool
) -> None:
    known = fleet("here")
    e = Endpoint(
        id="e",
        model="m",
        version="v",
        url="",
        state=state,
        slots=1,
        node=node,
        started_at=began,
        waits_until=waits_until,
    )
    known.set_snapshot(Snapshot(epoch="x", number=1, complete=True, endpoints=(e,)))
    assert known.starting_on("here", 1000.0) is starts

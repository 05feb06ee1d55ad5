"""The directory's table: who is there, for how long without a word, and since when it can be believed."""

from __future__ import annotations

from typing import Any

import pytest

from serving.fleet.directory import FAILED_KEPT_S, LEASE_S, SETTLE_S, Table
from serving.fleet.endpoint import Endpoint, GatewayInfo, State, advance

READY, FAILED = State.READY, State.FAILED


def endpoint(name: str = "a", state: State = READY, **more: Any) -> Endpoint:
    return Endpoint(
        **{"id": name, "model": "m", "version": "v", "url": f"http://{name}", "state": state, "slots": 2, **more}
    )


def ids(table: Table, now: float) -> list[str]:
    return [e.id for e in table.snapshot(now).endpoints]


def test_news_is_who_and_where_and_in_which_state_but_not_load() -> None:
    table = Table(0)
    assert table.announce(endpoint(), 0)
    assert not table.announce(endpoint(in_flight=7), 0)
    assert table.announce(endpoint(url="http://elsewhere"), 0)
    assert table.announce(endpoint(state=State.DRAINING), 0)


def test_load_alone_makes_a_new_number_when_it_is_published() -> None:
    table = Table(0)
    table.announce(endpoint(), 0)
    table.publish()
    before = table.snapshot(0)
    table.announce(endpoint(in_flight=7), 0)
    assert table.snapshot(0).number == before.number  # pollers are not sent round for every report of every replica
    table.publish()
    after = table.snapshot(0)
    assert (after.number > before.number, after.endpoints[0].in_flight) == (True, 7)


def test_a_report_that_says_nothing_new_is_no_news() -> None:
    table = Table(0)
    table.announce(endpoint(in_flight=7), 0)
    table.publish()
    before = table.number
    table.announce(endpoint(in_flight=7), 0)
    table.publish()
    assert table.number == before


def test_an_entry_that_is_not_renewed_is_dropped() -> None:
    table = Table(0)
    table.announce(endpoint("quiet"), 0)
    table.announce(endpoint("talks"), 0)
    table.announce(endpoint("talks"), LEASE_S)
    assert not table.expire(LEASE_S)
    assert table.expire(LEASE_S + 0.1)
    assert ids(table, LEASE_S + 0.1) == ["talks"]
    assert not table.expire(LEASE_S + 0.1)


def test_a_failure_stays_to_tell_why() -> None:
    table = Table(0)
    table.announce(endpoint(state=FAILED, reason="CUDA out of memory"), 0)
    assert not table.expire(FAILED_KEPT_S)
    assert table.snapshot(0).endpoints[0].reason == "CUDA out of memory"
    assert table.expire(FAILED_KEPT_S + 0.1)


def test_who_stops_is_gone_at_once() -> None:
    table = Table(0)
    table.announce(endpoint(), 0)
    assert table.announce(endpoint(state=State.STOPPED), 0)
    assert ids(table, 0) == []


def test_who_came_only_to_say_that_it_stopped_is_not_kept() -> None:
    table = Table(0)
    table.announce(endpoint(state=State.STOPPED), 0)
    assert ids(table, 0) == []


def test_a_new_directory_is_complete_when_everyone_had_time_to_speak() -> None:
    table = Table(100)
    assert not table.snapshot(100 + SETTLE_S - 0.1).complete
    assert table.snapshot(100 + SETTLE_S).complete


def test_a_restarted_directory_says_that_it_is_another() -> None:
    assert Table(0).snapshot(0).epoch != Table(0).snapshot(0).epoch


def test_gateways_come_renew_withdraw_and_expire() -> None:
    table = Table(0)
    one, two = GatewayInfo(id="one", url="http://one"), GatewayInfo(id="two", url="http://two")
    assert table.announce_gateway(one, 0) and table.announce_gateway(two, 0)
    assert not table.announce_gateway(one, 1)
    assert table.withdraw_gateway("two") and not table.withdraw_gateway("two")
    assert table.snapshot(1).gateways == (one,)
    assert table.expire(1 + LEASE_S + 0.1)
    assert table.snapshot(1).gateways == ()


def test_a_gateway_that_comes_or_goes_makes_a_new_number() -> None:
    table, numbers = Table(0), [0]
    for change in (
        lambda: table.announce_gateway(GatewayInfo(id="one", url="http://one"), 0),
        lambda: table.withdraw_gateway("one"),
    ):
        change()
        table.publish()
        numbers.append(table.number)
    assert numbers == [0, 1, 2]


@pytest.mark.parametrize("now", State)
def test_a_life_only_goes_forward(now: State) -> None:
    order = list(State)
    for to in State:
        try:
            assert advance(now, to) is to
        except RuntimeError:
            continue
        assert order.index(to) > order.index(now) or (now, to) == (FAILED, State.STOPPED)


def test_ready_again_after_draining_or_failure_is_refused() -> None:
    for now in (State.DRAINING, FAILED, State.STOPPED):
        with pytest.raises(RuntimeError, match="cannot go from"):
            advance(now, READY)

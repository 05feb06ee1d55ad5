"""The directory's table: who is there, for how long without a word, and since when it can be believed."""

from __future__ import annotations

import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serving.cli.main import _troubles
from serving.fleet.directory import (
    DOUBTED_S,
    FAILED_KEPT_S,
    LEASE_S,
    SETTLE_S,
    Table,
    pack,
    unpack,
)
from serving.fleet.endpoint import (
    ALONE_LONGEST_S,
    CRASH_WINDOW_S,
    CRASHES_KEPT,
    Endpoint,
    GatewayInfo,
    GpuReport,
    State,
    Target,
    VersionFacts,
    advance,
)
from serving.fleet.history import KEPT, Change, History, Kept, read, write
from serving.fleet.scaling import Load

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
    assert table.snapshot(FAILED_KEPT_S).endpoints[0].reason == "CUDA out of memory"
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


def test_a_new_directory_that_nobody_could_reach_for_a_while_has_begun_with_the_first_call() -> None:
    table = Table(100)
    table.begin(100 + SETTLE_S + 1)
    assert not table.snapshot(100 + SETTLE_S + 1).complete
    for half_seconds in range(round(2 * SETTLE_S) + 1):
        table.expire(101 + SETTLE_S + half_seconds / 2)
    assert table.snapshot(101 + 2 * SETTLE_S).complete


def test_a_new_directory_is_complete_when_everyone_had_time_to_speak() -> None:
    table = Table(100)
    assert not table.snapshot(100 + SETTLE_S - 0.1).complete
    assert table.snapshot(100 + SETTLE_S).complete


def test_a_restarted_directory_says_that_it_is_another() -> None:
    assert Table(0).snapshot(0).epoch != Table(0).snapshot(0).epoch


@pytest.mark.parametrize("first", ["the janitor", "a doubt", "the end of a doubt", "a report"])
def test_a_directory_that_stood_still_holds_nobodys_silence_against_him(first: str) -> None:
    """Whatever it does first when it goes on: the reports of that minute wait in its sockets, and have not been read yet."""
    table = Table(0)
    for name in ("a", "doubted", "reports"):
        table.announce(endpoint(name), 0)
    table.announce_gateway(GatewayInfo(id="g", url="x"), 0)
    table.expire(0.5)
    if first == "the end of a doubt":
        table.doubt("doubted", 0.6)
    if first == "a doubt":
        table.doubt("doubted", 60.4)
    if first == "a report":
        table.announce(endpoint("reports"), 60.4)
    assert not table.expire(60.5)
    assert ids(table, 60.5) == ["a", "doubted", "reports"] and table.snapshot(60.5).gateways
    for half in range(1, 13):  # nobody has reported since: they are gone
        table.expire(60.5 + half / 2)
    assert table.snapshot(67).gateways == table.snapshot(67).endpoints == ()


def test_nor_does_a_doubt_end_in_a_pause_or_the_time_to_speak() -> None:
    table = Table(0)
    table.expire(0.2)
    table.announce(endpoint("doubted"), 0.4)
    table.doubt("doubted", 0.6)
    assert not table.expire(1.4)
    assert not table.snapshot(61.4).complete, "a directory that began a second before the pause"
    assert not table.expire(61.4)


def test_a_directory_that_is_starved_for_long_learns_in_the_end_who_is_gone() -> None:
    """Pause after pause: what it does between them counts."""
    table = Table(0)
    table.announce(endpoint(), 0)
    for round_ in range(40):
        table.expire(1.6 * round_)
    assert table.snapshot(64).endpoints == () and table.snapshot(64).complete


def test_whose_listener_ended_is_gone_soon_unless_it_says_that_it_lives() -> None:
    table = Table(0)
    for name in ("dead", "lives"):
        table.announce(endpoint(name), 0)
        table.announce_gateway(GatewayInfo(id=f"gateway-{name}", url="http://g"), 0)
        table.doubt(name, 0)
        table.doubt(f"gateway-{name}", 0)
    table.announce(endpoint("lives"), 0.5)
    table.announce_gateway(GatewayInfo(id="gateway-lives", url="http://g"), 0.5)
    assert table.expire(DOUBTED_S + 0.01) and ids(table, 1) == ["lives"]
    assert [g.id for g in table.snapshot(1).gateways] == ["gateway-lives"]


def test_a_failure_whose_listener_ended_stays_to_tell_why() -> None:
    table = Table(0)
    table.announce(endpoint(state=State.FAILED), 0)
    assert table.doubt("a", 0) == table.doubt("unknown", 0) == 0
    table.expire(DOUBTED_S + 0.01)
    assert ids(table, 3) == ["a"] and table.listeners() == {}


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
        back = [(FAILED, State.STOPPED), (State.SUSPECT, READY)]
        assert order.index(to) > order.index(now) or (now, to) in back


def test_ready_again_after_draining_or_failure_is_refused() -> None:
    for now in (State.DRAINING, FAILED, State.STOPPED):
        with pytest.raises(RuntimeError, match="cannot go from"):
            advance(now, READY)


def test_how_long_a_start_took_outlives_the_replica() -> None:
    table = Table(0)
    table.announce(endpoint(state=State.STARTING), 0)
    table.announce(endpoint(ready_after_s=12.5), 0)
    table.announce(endpoint(state=State.STOPPED), 0)
    assert table.snapshot(0).versions["m@v"].ready_after_s == 12.5


def test_the_newest_start_is_the_one_that_is_known() -> None:
    table = Table(0)
    for name, took in (("a", 10.0), ("b", 20.0)):
        table.announce(endpoint(name, State.STARTING), 0)
        table.announce(endpoint(name, ready_after_s=took), 0)
    table.announce(endpoint("a", ready_after_s=10.0), 1)  # it is there, and says so twice a second
    table.announce(endpoint("c", ready_after_s=30.0), 1)  # it was there before this directory was
    assert table.facts("m@v").ready_after_s == 20.0


def test_failed_starts_make_the_next_one_wait_longer_and_longer() -> None:
    wall = [1000.0]
    table = Table(0, wall=lambda: wall[0])
    delays = []
    for i in range(12):
        table.announce(endpoint(f"r{i}", State.STARTING, spec="s"), 0)
        for _ in range(3):  # told again and again, counted once
            table.announce(endpoint(f"r{i}", FAILED, spec="s", reason="no weights"), 0)
        delays.append(table.start_delay_s("m@v", "s"))
    assert delays[:5] == [0, 0, 10, 20, 40] and delays[-1] == 300
    assert table.facts("m@v").reason == "no weights"
    wall[0] += 299
    assert table.start_delay_s("m@v", "s") == 1


def test_starts_that_failed_on_one_node_keep_no_other_from_starting() -> None:
    table = Table(0, lambda: 1000.0)
    for i in range(8):
        table.announce(endpoint(f"r{i}", State.STARTING, spec="s", node="bad"), 0)
        table.announce(endpoint(f"r{i}", FAILED, spec="s", node="bad", reason="CUDA error"), 0)
    assert table.start_delay_s("m@v", "s", "bad") == 300
    assert table.start_delay_s("m@v", "s", "good") == 0
    table.announce(endpoint("r8", State.STARTING, spec="s", node="good"), 0)
    table.announce(endpoint("r8", FAILED, spec="s", node="good", reason="no weights"), 0)
    assert table.start_delay_s("m@v", "s", "good") == 300, "it is not the node"


def test_what_failed_before_the_clock_was_set_back_pauses_nothing_for_as_long() -> None:
    wall = [7600.0]
    table = Table(0, wall=lambda: wall[0])
    table.announce(endpoint("r", State.STARTING, spec="s"), 0)
    table.announce(endpoint("r", FAILED, spec="s", reason="no weights"), 0)
    for i in range(3):
        crashed(table, f"c{i}")
    wall[0] -= 3600
    table.expire(0)
    assert table.start_delay_s("m@v", "s") == 0
    assert table.start_delay_s("m@v", "s", "n1") == ALONE_LONGEST_S
    wall[0] += ALONE_LONGEST_S
    assert table.start_delay_s("m@v", "s", "n1") == 0


def test_failures_are_forgotten_after_a_good_start_another_engine_or_a_word_of_the_operator() -> None:
    def failed() -> Table:
        table = Table(0)
        for i in range(5):
            table.announce(endpoint(f"r{i}", State.STARTING, spec="s"), 0)
            table.announce(endpoint(f"r{i}", FAILED, spec="s"), 0)
        assert table.start_delay_s("m@v", "s") > 0
        return table

    assert failed().start_delay_s("m@v", "other") == 0
    table = failed()
    table.forget_failures()
    assert table.start_delay_s("m@v", "s") == 0
    table = failed()
    table.announce(endpoint("good", State.STARTING, spec="s"), 0)
    table.announce(endpoint("good", ready_after_s=1.0, spec="s"), 0)
    assert (table.start_delay_s("m@v", "s"), table.facts("m@v").failures) == (0, 0)


def test_an_engine_that_dies_while_it_serves_is_no_failed_start() -> None:
    table = Table(0)
    table.announce(endpoint(ready_after_s=1.0), 0)
    table.announce(endpoint(state=FAILED, ready_after_s=1.0), 0)
    assert table.facts("m@v").failures == 0


def test_a_gateway_that_begins_to_hold_is_news_and_one_that_holds_more_is_load() -> None:
    table = Table(0)
    gateway = lambda **held: GatewayInfo(id="g", url="", held=held)  # noqa: E731
    assert table.announce_gateway(gateway(), 0)
    assert table.announce_gateway(gateway(a=1), 0)
    assert not table.announce_gateway(gateway(a=2), 0) and table.unpublished
    table.publish()
    assert not table.announce_gateway(gateway(a=2), 0) and not table.unpublished


def test_the_history_is_bounded_and_keeps_the_last() -> None:
    history = History()
    for i in range(KEPT + 5):
        history.add(Change(version_id="m@v", at=i, before=1, after=2, cause="load", reason=str(i)))
    assert [c.at for c in history.of("m@v")] == list(range(5, KEPT + 5))
    assert history.of("other@v") == []


def test_an_exporter_is_told_who_holds_its_nodes_gpus_and_what_it_saw_is_told_to_all() -> None:
    table = Table(0)
    for name, node, gpus in (("a", "n1", ("0",)), ("b", "n2", ("0",)), ("c", "n1", ())):
        table.announce(endpoint(name, node=node, gpus=gpus), 0)
    table.announce(endpoint("dead", FAILED, node="n1", gpus=("0",)), 0)
    report = GpuReport(target=Target(id="gpu#n1", component="gpu", url="http://n1/metrics", node="n1"), busy={"a": 0.5})
    assert table.report_gpus(report, 0)
    assert [e.id for e in table.holders("n1", 0).endpoints] == ["a"]
    assert (table.holders("n1", 0).complete, table.holders("n1", SETTLE_S).complete) == (False, True)
    assert not table.report_gpus(report, 1)
    snapshot = table.snapshot(1)
    assert (snapshot.gpu_busy, [t.id for t in snapshot.targets]) == ({"a": 0.5}, ["gpu#n1"])
    assert table.expire(LEASE_S + 1.1)
    assert (table.snapshot(7).gpu_busy, table.snapshot(7).targets) == ({}, ())


# -- failures of those that served


def crashed(table: Table, name: str, node: str = "n1", spec: str = "s") -> None:
    like = {"node": node, "spec": spec, "ready_after_s": 1.0}
    table.announce(endpoint(name, **like), 0)
    table.announce(endpoint(name, FAILED, reason="stuck: no step", fault="stuck", **like), 0)


def test_who_fails_again_and_again_on_a_node_stays_away_from_it_while_others_serve() -> None:
    wall = [1000.0]
    table = Table(0, lambda: wall[0])
    table.announce(endpoint("well", node="n2", spec="s"), 0)
    for i in range(3):
        assert table.start_delay_s("m@v", "s", "n1") == 0
        crashed(table, f"r{i}")
    assert table.start_delay_s("m@v", "s", "n1") == 10
    assert (table.start_delay_s("m@v", "s", "n2"), table.start_delay_s("m@v", "mended", "n1")) == (0, 0)
    assert table.quarantined() == {("m@v", "n1"): 10.0}
    crashed(table, "r3")
    assert table.start_delay_s("m@v", "s", "n1") == 20
    wall[0] += 20
    assert table.start_delay_s("m@v", "s", "n1") == 0 and not table.quarantined()


def test_where_nobody_else_serves_the_pause_is_short() -> None:
    table = Table(0, lambda: 1000.0)
    for i in range(8):
        crashed(table, f"r{i}")
    assert table.start_delay_s("m@v", "s", "n1") == ALONE_LONGEST_S


def test_a_quarantine_is_over_when_an_operator_changes_something() -> None:
    table = Table(0, lambda: 1000.0)
    for i in range(3):
        crashed(table, f"r{i}")
    table.forget_failures()
    assert table.start_delay_s("m@v", "s", "n1") == 0


def test_failures_long_ago_count_no_more_and_are_not_kept() -> None:
    wall = [1000.0]
    table = Table(0, lambda: wall[0])
    for i in range(CRASHES_KEPT + 5):
        crashed(table, f"r{i}")
    assert len(table.facts("m@v").crashes) == CRASHES_KEPT
    wall[0] += CRASH_WINDOW_S
    crashed(table, "late")
    assert len(table.facts("m@v").crashes) == 1 and table.start_delay_s("m@v", "s", "n1") == 0


def test_a_suspect_that_is_well_again_did_not_start_anew() -> None:
    table = Table(0, lambda: 1000.0)
    crashed(table, "gone")
    table.announce(endpoint("a", ready_after_s=9.0), 0)
    table.announce(endpoint("a", State.SUSPECT, ready_after_s=9.0), 0)
    assert table.announce(endpoint("a", ready_after_s=9.0), 0)
    assert len(table.facts("m@v").crashes) == 1


def test_a_state_of_a_newer_release_is_not_ready() -> None:
    assert unpack(pack("NAPPING"), State) is State.SUSPECT


def test_what_a_gateway_saw_of_engines_that_died_is_told_at_once() -> None:
    table = Table(0)
    table.announce_gateway(GatewayInfo(id="one", url="http://one"), 0)
    died = GatewayInfo(id="one", url="http://one", deaths={"print": ("m@v#1",)})
    assert table.announce_gateway(died, 0)
    assert not table.announce_gateway(died, 0)


def test_status_names_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.cli.main.time", SimpleNamespace(time=lambda: 1000.0))
    table = Table(0, lambda: 1000.0)
    table.announce(endpoint("odd", State.SUSPECT, reason="stuck: no step for 4.0 s with 2 inside", fault="stuck"), 0)
    for i in range(3):
        crashed(table, f"r{i}")
    table.announce(endpoint("r0", State.STOPPED), 0)
    lines = list(_troubles(table.snapshot(0)))
    assert lines[0] == "odd is SUSPECT: stuck: no step for 4.0 s with 2 inside\n"
    assert lines[-1].startswith("m@v is quarantined on n1 for 5 s: 3 failures, the last: stuck: no step"), (
        "nobody serves"
    )
    table.announce(endpoint("well", node="n2"), 0)
    assert "m@v is quarantined on n1 for 10 s" in "".join(_troubles(table.snapshot(0)))


def test_start_times_and_changes_outlive_the_directory(tmp_path: Path) -> None:
    table, changes = Table(0), History()
    table.announce(endpoint(ready_after_s=4.5), 0)
    table.announce(endpoint("b", FAILED, version="bad"), 0)
    change = Change(
        version_id="m@v", at=1.0, before=0, after=1, cause="from_zero", reason="held 1", load=Load(replicas=0, ready=0)
    )
    changes.add(change)
    file = tmp_path / "directory.json"
    write(file, Kept(ready_after_s=table.ready_after_s(), changes=changes.all()))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    kept = read(file)
    again = Table(0, ready_after_s=kept.ready_after_s)
    assert again.facts("m@v") == VersionFacts(ready_after_s=4.5)
    assert again.facts("m@bad") == VersionFacts(), "what failed may be mended"
    assert History(kept.changes).of("m@v") == [change]


@pytest.mark.parametrize("text", [None, b"", b"{", b'{"changes": 1}', b'{"changes": {"m\xff": []}}'])
def test_a_file_of_the_past_that_cannot_be_read_is_an_empty_one(tmp_path: Path, text: bytes | None) -> None:
    file = tmp_path / "directory.json"
    if text is not None:
        file.write_bytes(text)
    assert read(file) == Kept()

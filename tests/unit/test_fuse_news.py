"""What gateways hear of each other's deaths, of those that left too, and what it costs where an engine takes hundreds with it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.fleet.directory import LEFT_KEPT, SETTLE_S, Table, pack, unpack
from serving.fleet.endpoint import Deaths, GatewayInfo, Snapshot
from serving.fleet.history import Kept
from serving.gateway.fuse import HEARD_S, REMEMBERED_S, TOLD, Fuse
from serving.gateway.state import TOLD_BEFORE_S, Fleet

# -- of gateways that left


class Cluster:
    """A directory and gateways, with one clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.table = Table(0.0, self.clock)
        self.fleets: dict[str, Fleet] = {}

    def clock(self) -> float:
        return self.now

    def gateway(self, name: str) -> Fuse:
        fleet = self.fleets[name] = Fleet(name, clock=self.clock)
        self.hears(fleet)
        return fleet.fuse

    def news(self) -> None:
        """Each gateway tells, then all hear."""
        for name, fleet in self.fleets.items():
            told, ages = fleet.fuse.told(), fleet.fuse.ages()
            info = GatewayInfo(
                id=name, url="", deaths=told.deaths, trials=told.trials, suspects=told.suspects, died=ages
            )
            self.table.announce_gateway(unpack(pack(info), GatewayInfo), self.now)
        self.table.expire(self.now)
        for fleet in self.fleets.values():
            self.hears(fleet)

    def hears(self, fleet: Fleet) -> None:
        fleet.set_snapshot(unpack(pack(self.table.snapshot(self.now)), Snapshot))

    def leaves(self, name: str) -> None:
        del self.fleets[name]
        self.table.withdraw_gateway(name)

    def restart(self) -> None:
        deaths, died = self.table.deaths()
        kept = unpack(pack(Kept(deaths=deaths, died=died)), Kept)
        self.table = Table(self.now, self.clock, deaths=kept.deaths, died=kept.died)


def killed_two(cluster: Cluster, name: str = "old") -> None:
    fuse = cluster.gateway(name)
    for engine in "ab":
        fuse.died("poison", engine, begun=True)
    cluster.news()


def test_what_a_gateway_saw_die_outlives_it_at_the_others_and_at_those_that_come_after_it() -> None:
    cluster = Cluster()
    stays = cluster.gateway("stays")
    killed_two(cluster)
    cluster.leaves("old")
    cluster.news()
    new = cluster.gateway("new")
    assert stays.blown("poison") and new.blown("poison")
    cluster.restart()
    cluster.news()
    assert stays.blown("poison") and new.blown("poison") and cluster.gateway("newer").blown("poison")


def test_it_is_remembered_as_long_as_if_the_gateway_lived_however_often_gateways_are_replaced() -> None:
    cluster = Cluster()
    killed_two(cluster)
    for i in range(9):
        cluster.leaves(next(iter(cluster.fleets)))
        cluster.now += REMEMBERED_S / 10
        new = cluster.gateway(f"new-{i}")
        cluster.news()
        assert new.blown("poison")
    cluster.now = REMEMBERED_S
    cluster.news()
    assert not new.armed
    assert (cluster.table.deaths(), cluster.table.snapshot(cluster.now).died) == (({}, {}), {})


def test_a_gateway_that_lives_takes_back_what_it_told_also_where_the_table_had_lost_it() -> None:
    cluster = Cluster()
    here = cluster.gateway("here")
    killed_two(cluster)
    cluster.table.withdraw_gateway("old")  # it was silent for longer than its lease
    cluster.hears(cluster.fleets["here"])
    assert here.blown("poison")
    cluster.fleets["old"].fuse.survived("poison")
    cluster.news()
    assert not here.armed


def test_two_gateways_that_saw_one_death_and_left_have_seen_one() -> None:
    cluster = Cluster()
    for name in ("one", "two"):
        cluster.gateway(name).died("twin", "a", begun=True)
    cluster.news()
    cluster.leaves("one")
    cluster.leaves("two")
    new = cluster.gateway("new")
    assert new.armed and not new.blown("twin")
    assert new.died("twin", "b") == 2


@pytest.mark.parametrize("left", [False, True])
def test_a_directory_that_comes_back_empty_makes_nobody_forget_while_it_is_incomplete(left: bool) -> None:
    cluster = Cluster()
    here = cluster.gateway("here")
    old = cluster.gateway("old")
    for print_ in ("poison", "innocent"):
        for engine in "ab":
            old.died(print_, engine, begun=True)
    cluster.news()
    here.survived("innocent")
    if left:
        cluster.leaves("old")
        cluster.hears(cluster.fleets["here"])
    cluster.table = Table(cluster.now, cluster.clock)
    cluster.hears(cluster.fleets["here"])
    cluster.hears(cluster.fleets["here"])
    assert here.blown("poison") and not here.blown("innocent")
    if not left:
        cluster.news()
        assert here.blown("poison") and not here.blown("innocent"), "what was acquitted stays so"
        old.survived("poison")
        cluster.news()
        assert not here.blown("poison"), "its own word counts"
    cluster.fleets.pop("old", None)
    cluster.table = Table(cluster.now, cluster.clock)
    cluster.now += SETTLE_S
    cluster.news()
    assert not here.armed, "one that is complete and does not know it has forgotten it"


def test_what_was_heard_since_an_old_directory_last_wrote_is_not_forgotten_while_the_new_one_is_incomplete() -> None:
    cluster = Cluster()
    here = cluster.gateway("here")
    old = cluster.gateway("old")
    old.died("poison", "a", begun=True)
    cluster.news()
    deaths, died = cluster.table.deaths()
    old.died("poison", "b", begun=True)
    cluster.news()
    assert here.blown("poison")
    cluster.table = Table(cluster.now, cluster.clock, deaths=deaths, died=died)
    cluster.hears(cluster.fleets["here"])
    assert here.blown("poison")


def test_a_new_gateway_hears_when_and_in_which_order_engines_died() -> None:
    cluster = Cluster()
    old = cluster.gateway("old")
    old.died("gone", "b")  # a newcomer there, whose client left
    old.died("guilty", "a", begun=True)
    cluster.now = 3.0
    old.died("guilty", "b", 0.2, begun=True)
    cluster.now = 4.0
    cluster.news()
    cluster.leaves("old")
    cluster.now = HEARD_S - 0.1
    new = cluster.gateway("new")
    assert new.pending("guilty"), "the newcomer may still be tried"
    cluster.now = HEARD_S + 0.1
    assert new.blown("guilty"), "since the death, not since it was heard"
    assert new._order("b") < new._order("a"), "b died first, of what this one was told"


def test_what_gateways_that_left_told_is_bounded() -> None:
    table = Table(0)
    for i in range(2 * LEFT_KEPT // TOLD):
        deaths = {f"{i}-{j}": ("a",) for j in range(TOLD)}
        table.announce_gateway(GatewayInfo(id=str(i), url="", deaths=deaths), 0)
        table.withdraw_gateway(str(i))
    table.expire(0)
    left = table.snapshot(0).left
    assert sum(len(d.deaths) for d in left.values()) == LEFT_KEPT
    assert str(i) in left and "0" not in left, "the last ones are kept"


def test_deaths_do_not_outlast_a_clock_that_was_set_back() -> None:
    cluster = Cluster()
    cluster.now = 5 * 3600.0
    killed_two(cluster)
    cluster.leaves("old")
    cluster.restart()
    cluster.now = 0.0
    cluster.news()
    assert cluster.gateway("new").blown("poison")
    cluster.now = REMEMBERED_S
    cluster.news()
    assert not cluster.gateway("newer").armed


def test_up_forgives_what_nobody_can_take_back() -> None:
    cluster = Cluster()
    stays = cluster.gateway("stays")
    killed_two(cluster)
    cluster.leaves("old")
    cluster.news()
    assert stays.blown("poison")
    cluster.table.forget_failures()
    cluster.news()
    assert not stays.armed


def test_what_only_an_earlier_directory_heard_is_forgotten_however_often_directories_come_and_go() -> None:
    cluster = Cluster()
    stays = cluster.gateway("stays")
    killed_two(cluster)
    cluster.leaves("old")
    cluster.news()
    cluster.table = Table(cluster.now, cluster.clock)  # it lost what it kept
    cluster.news()
    assert stays.blown("poison")
    for _ in range(3):
        cluster.now += TOLD_BEFORE_S / 2
        cluster.table = Table(cluster.now, cluster.clock)
        cluster.news()
    assert not stays.armed


def test_that_time_passes_is_no_news_of_a_death() -> None:
    table = Table(0, lambda: 0.0)
    died = GatewayInfo(id="one", url="", deaths={"print": ("a",)}, died={"a": 1.0})
    assert table.announce_gateway(died, 0)
    table.publish()
    assert not table.announce_gateway(GatewayInfo(id="one", url="", deaths={"print": ("a",)}, died={"a": 1.5}), 0)
    assert not table.unpublished
    assert table.snapshot(0).died == {"a": 1.0}


NAMES = st.sampled_from("pqrs")
TALES = st.builds(
    lambda deaths, suspects: Deaths(deaths, {}, tuple(p for p in suspects if p in deaths)),
    st.dictionaries(NAMES, st.lists(st.sampled_from("abc"), min_size=1, unique=True).map(tuple)),
    st.lists(NAMES, unique=True),
)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(TALES, max_size=3), min_size=1, max_size=5))
def test_what_is_heard_message_by_message_is_what_the_last_one_says(messages: list[list[Deaths]]) -> None:
    """Each says all; only what differs is looked at."""
    heard, at_once = Fuse(lambda: 0.0), Fuse(lambda: 0.0)
    for told in messages:
        heard.hear(told)
    at_once.hear(messages[-1])
    for of in ("_others", "_others_suspects", "_stands", "_together", "_among"):
        assert getattr(heard, of) == getattr(at_once, of), of


# -- what it costs


def work(does: Callable[[], Any]) -> int:
    """Bytecodes: what it takes on any machine, however busy."""
    count = 0

    def step(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return step

    before = sys.gettrace()
    sys.settrace(step)
    try:
        does()
    finally:
        sys.settrace(before)
    return count


def incident(remembered: int, inside: int, *, again: bool) -> Fuse:
    """Ten that ended engines are in memory beside so many others. `again`: those inside the engine that dies next were inside
    another one."""
    fuse = Fuse()
    for i in range(remembered):
        fuse.died(f"other-{i}", f"engine-{i % 16}")
    for i in range(10):
        fuse.died(f"guilty-{i}", f"first-{i}")
        fuse.died(f"guilty-{i}", f"second-{i}", 0.2)
    for i in range(inside if again else 1):
        fuse.died(str(i), "before")
    return fuse


def dies(fuse: Fuse, inside: int) -> None:
    for i in range(inside):
        fuse.died(str(i), "engine", 0.3 if i == 0 else 0.0)
        for ask in (fuse.suspected, fuse.pending, fuse.blown):
            ask(str(i))


@pytest.mark.parametrize("again", [False, True])
def test_the_death_of_an_engine_costs_by_those_inside_and_not_by_all_that_are_remembered(again: bool) -> None:
    few = work(lambda f=incident(100, 50, again=again): dies(f, 50))
    many = work(lambda f=incident(4000, 50, again=again): dies(f, 50))
    twice = work(lambda f=incident(100, 100, again=again): dies(f, 100))
    assert many < 1.5 * few
    assert twice < 2.5 * few
    assert few < 50 * 3000


def test_news_that_say_nothing_new_cost_nothing() -> None:
    fuse = Fuse()
    info = GatewayInfo(id="x", url="", deaths={str(i): ("a", "b") for i in range(TOLD)}, suspects=("1", "2"))
    messages = [pack([info] * 4) for _ in range(3)]
    first, same = (unpack(m, list[GatewayInfo]) for m in messages[:2])
    assert work(lambda: fuse.hear(first)) > 1000
    assert work(lambda: fuse.hear(same)) < 100

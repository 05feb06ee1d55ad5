"""Bounds of trying again: how many at once, who beside whom, which engine is left alone, and which request is refused."""

from __future__ import annotations

import asyncio
import random
from typing import Any
from unittest import mock

import pytest

from serving.fleet.endpoint import Endpoint, State
from serving.gateway.fuse import DEATHS, MOST, REMEMBERED_S, TOLD, Charge, Fuse, fingerprint
from serving.gateway.queue import Ticket, VersionLine
from serving.gateway.retry import (
    LEAST,
    SHARE,
    SILENT_LEAST_S,
    SILENT_TIMES,
    WINDOW_S,
    Patience,
    Retry,
    Trials,
    Turns,
    budget,
)
from serving.gateway.routing import TRIPS, TRY_FIRST_S, TRY_LONGEST_S, Upstream


async def test_retries_are_a_share_of_what_runs_and_the_rest_waits_its_turn() -> None:
    running = 50
    turns = budget(lambda: running)
    most = int(SHARE * running)
    under_way, peak, done = 0, 0, []

    async def retry(i: int) -> None:
        nonlocal under_way, peak
        await turns.take()
        under_way += 1
        peak = max(peak, under_way)
        await asyncio.sleep(0)
        under_way -= 1
        done.append(i)
        turns.give()

    await asyncio.gather(*(retry(i) for i in range(100)))
    assert (peak, done, turns.free()) == (most, list(range(100)), most)


async def test_a_few_retries_are_always_allowed() -> None:
    assert budget(lambda: 0).free() == LEAST


async def test_whoever_leaves_while_waiting_takes_no_turn_with_him() -> None:
    turns = Turns(lambda: 1)
    random.seed(6)

    async def one() -> None:
        await turns.take()
        try:
            await asyncio.sleep(random.choice([0, 0, 0.001]))
        finally:
            turns.give()

    tasks = [asyncio.create_task(one()) for _ in range(200)]
    for task in random.sample(tasks, 100):
        await asyncio.sleep(0)
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert turns.free() == 1


async def test_second_chances_are_given_one_at_a_time_on_each_engine() -> None:
    trials = Trials(lambda: 2)
    chances = [Retry(budget(lambda: 1000), trials) for _ in range(4)]
    tasks = [asyncio.create_task(c.turn(suspect=True)) for c in chances]
    await asyncio.sleep(0)
    assert [t.done() for t in tasks] == [True, True, False, False]
    chances[0].sent("a")
    chances[1].sent("b")
    assert trials.on == {"a", "b"}
    chances[1].close()
    chances[1].close()
    await asyncio.sleep(0)
    assert trials.on == {"a"} and [t.done() for t in tasks] == [True, True, True, False]
    for chance in chances:
        chance.close()
    await asyncio.gather(*tasks)
    chances[3].close()
    assert not trials.on and trials.turns.free() == 2


async def test_answers_that_take_long_keep_no_other_retry_waiting() -> None:
    line = VersionLine("m@v")
    line.update([endpoint("a")], only_add=False)
    chances = [Retry(line.retries, line.trials) for _ in range(2 * LEAST)]
    with mock.patch("serving.gateway.retry.TRIAL_S", 0.001):
        for chance in chances:
            await chance.turn(suspect=True)
            chance.sent("a")
    while line.trials.turns.free() == 0:
        await asyncio.sleep(0.001)
    assert line.retries.free() == LEAST and not line.trials.on


def test_a_first_event_may_take_ten_times_as_long_as_the_slowest_of_late() -> None:
    patience = Patience()
    assert patience.bound_s() == SILENT_LEAST_S
    patience.took(8.0, 1000)
    patience.took(0.1, 1001)
    assert patience.bound_s() == SILENT_TIMES * 8
    patience.took(0.1, 1000 + WINDOW_S)
    assert patience.bound_s() == SILENT_TIMES * 8
    patience.took(0.1, 1001 + 2 * WINDOW_S)
    assert patience.bound_s() == SILENT_LEAST_S


# -- the breaker


def endpoint(name: str, **more: Any) -> Endpoint:
    return Endpoint(id=name, model="m", version="v", url=f"http://{name}", state=State.READY, slots=8, **more)


def test_after_failures_in_a_row_one_more_is_tried_at_a_time_ever_more_rarely() -> None:
    upstream = Upstream(endpoint("a"))
    for _ in range(TRIPS):
        assert upstream.room(100)
        upstream.bind(100)
        upstream.unbind()
        upstream.failed(100, alone=False, since=100)
    now, pauses = 100.0, []
    for _ in range(8):
        assert not upstream.room(now)
        pauses.append(upstream.try_at - now)
        now = upstream.try_at
        assert upstream.room(now)
        upstream.bind(now)
        assert not upstream.room(now)  # half open: one
        upstream.unbind()
        upstream.failed(now, alone=False, since=now)
    assert pauses[:3] == [TRY_FIRST_S, TRY_FIRST_S * 2, TRY_FIRST_S * 4] and max(pauses) == TRY_LONGEST_S
    upstream.close_breaker()
    assert upstream.room(now) and not upstream.tripped


def test_those_that_fail_together_open_the_breaker_once() -> None:
    upstream = Upstream(endpoint("a"))
    for _ in range(40):
        upstream.failed(100, alone=False, since=90)
    assert upstream.tripped and upstream.try_at == 100 + TRY_FIRST_S


def test_an_engine_that_is_well_again_is_asked_again_at_once() -> None:
    upstream = Upstream(endpoint("a"))
    fields = {f: getattr(upstream.endpoint, f) for f in upstream.endpoint.__struct_fields__}
    upstream.heard(Endpoint(**fields | {"state": State.SUSPECT}))
    for _ in range(TRIPS):
        upstream.failed(100, alone=False, since=90)
    assert upstream.tripped
    upstream.heard(endpoint("a"))
    assert not upstream.tripped and upstream.room(100)


def test_a_success_between_keeps_the_breaker_closed() -> None:
    upstream = Upstream(endpoint("a"))
    for _ in range(5 * TRIPS):
        upstream.failed(0, alone=False, since=0)
        if upstream.failures == TRIPS - 1:
            upstream.close_breaker()
    assert not upstream.tripped


async def test_the_last_engine_is_never_left_alone() -> None:
    """A client whose requests no engine can answer must not close a model to everybody."""
    line = VersionLine("m@v")
    line.update([endpoint("a"), endpoint("b")], only_add=False)
    for _ in range(8 * TRIPS):
        ticket = Ticket(since=0.0)
        await line.take(ticket, others=0, max_queue=8, max_wait_s=0.1)
        line.failed(ticket)
    assert sorted(u.tripped for u in line.upstreams.values()) == [False, True]
    closed = next(i for i, u in line.upstreams.items() if not u.tripped)
    line.update([e for e in (endpoint("a"), endpoint("b")) if e.id != closed], only_add=False)
    assert [u.tripped for u in line.upstreams.values()] == [False]


# -- silence


class Attempt:
    def __init__(self, since: float, *, stream: bool = True, patient: bool = False) -> None:
        self.since, self.stream, self.patient = since, stream, patient
        self.gave_up: bool | None = None

    def give_up(self, why: str, *, suspect: bool) -> None:
        self.gave_up = suspect


def test_attempts_at_a_suspect_go_elsewhere_as_far_as_there_are_a_place_and_a_turn() -> None:
    line = VersionLine("m@v")
    line.update([endpoint("a"), endpoint("b")], only_add=False)
    attempts = [Attempt(99.0 + i, stream=False) for i in range(4)]
    line.upstreams["a"].awaiting |= {*attempts, Attempt(1.0, patient=True)}
    assert line.give_up_on_the_silent(100) == 0
    for _ in range(6):
        line.upstreams["b"].bind(100)
    suspect = Endpoint(
        **{f: getattr(endpoint("a"), f) for f in endpoint("a").__struct_fields__} | {"state": State.SUSPECT}
    )
    line.update([suspect, endpoint("b")], only_add=False)
    assert line.give_up_on_the_silent(100) == 1
    assert [a.gave_up for a in attempts] == [True, None, None, None], "the others wait where they are"
    line.upstreams["b"].bind(100)
    line.upstreams["b"].bind(100)
    assert line.give_up_on_the_silent(100) == 0


def test_attempts_at_one_that_left_the_table_go_elsewhere() -> None:
    line = VersionLine("m@v")
    line.update([endpoint("a"), endpoint("b")], only_add=False)
    attempt = Attempt(99.0, stream=False)
    line.upstreams["a"].awaiting.add(attempt)
    line.update([endpoint("b")], only_add=True)
    assert line.give_up_on_the_silent(100) == 0
    line.update([endpoint("b")], only_add=False)
    assert line.give_up_on_the_silent(100) == 1 and attempt.gave_up


def test_streams_that_say_nothing_for_long_go_elsewhere_and_whole_answers_wait() -> None:
    line = VersionLine("m@v")
    line.update([endpoint("a"), endpoint("b")], only_add=False)
    stream, whole = Attempt(0.0), Attempt(0.0, stream=False)
    line.upstreams["a"].awaiting |= {stream, whole}
    assert line.give_up_on_the_silent(SILENT_LEAST_S) == 0
    assert line.give_up_on_the_silent(SILENT_LEAST_S + 1) == 1
    assert (stream.gave_up, whole.gave_up) == (False, None)


# -- the fuse

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "boom"}], "max_tokens": 6}


def charge(fuse: Fuse, **fields: Any) -> Charge:
    return Charge(fuse, "m@v", "/v1/chat/completions", None, CHAT | fields)


def test_a_blown_fuse_stays_so_whichever_engine_is_told_of_again() -> None:
    fuse = Fuse()
    for engine in ("a", "b", "a", "b", "c", "a"):
        deaths = fuse.died("print", engine)
    assert deaths == DEATHS and fuse.blown("print")


def test_who_was_inside_before_anybody_was_remembered_acquits_too() -> None:
    fuse = Fuse()
    early, late = charge(fuse), charge(fuse)
    late.died("a")
    late.died("b")
    assert charge(fuse).blown
    early.survived()
    assert not charge(fuse).blown


def test_what_says_nothing_to_the_engine_makes_no_other_request_of_it() -> None:
    def print_of(version: str = "m@v", adapter: str | None = None, **fields: Any) -> str:
        return fingerprint(version, "/v1/chat/completions", adapter, CHAT | fields)

    same = print_of()
    assert {print_of(stream=True), print_of(seed=1, user="u", model="m@v")} == {same}
    others = {print_of("m@w"), print_of(adapter="x"), print_of(max_tokens=7), print_of(messages=[])}
    assert same not in others and len(others) == 4


def test_two_deaths_blow_it_for_a_while() -> None:
    now = [0.0]
    fuse = Fuse(lambda: now[0])
    assert not fuse.armed and not charge(fuse).blown
    first = charge(fuse)
    assert (first.died("a"), charge(fuse).blown) == (1, False)
    assert (first.died("a"), charge(fuse).blown) == (1, False)  # it lives, and cuts whatever it answers
    assert first.died("b") == DEATHS
    assert charge(fuse).blown and not charge(fuse, max_tokens=7).blown
    now[0] = REMEMBERED_S
    assert not charge(fuse).blown


def test_who_is_answered_to_the_end_is_acquitted_here_and_of_what_others_tell() -> None:
    here, there = Fuse(), Fuse()
    charge(there).died("a")
    here.hear([there.told()])
    charge(here).survived()
    charge(here).died("b")
    assert not charge(here).blown
    charge(here).survived()
    assert here.told() == {}


def test_gateways_count_together() -> None:
    here, there, news = Fuse(), Fuse(), []
    there.on_news = lambda: news.append(1)
    charge(here).died("a")
    charge(there).died("a")
    here.hear([there.told()])
    assert news and not charge(here).blown  # both lost theirs by one death
    charge(there).died("b")
    here.hear([there.told()])
    assert charge(here).blown


def test_what_is_remembered_and_told_is_bounded() -> None:
    fuse = Fuse()
    for i in range(MOST + 10):
        fuse.died(str(i), "a")
    assert len(fuse._own) == MOST and len(fuse.told()) == TOLD


@pytest.mark.parametrize("count", [0, 3])
def test_an_unarmed_fuse_computes_nothing(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.gateway.fuse.fingerprint", lambda *_: pytest.fail("a fingerprint was made"))
    fuse = Fuse()
    for _ in range(count):
        asked = charge(fuse)
        assert not asked.blown
        asked.survived()

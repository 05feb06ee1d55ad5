"""Bounds of trying again: how many at once, who beside whom, which engine is left alone, and which request is refused."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any
from unittest import mock

import msgspec
import pytest

from serving.errors import QueueFull
from serving.fleet.endpoint import Endpoint, State
from serving.gateway.fuse import DEATHS, HEARD_S, MOST, REMEMBERED_S, TOLD, Charge, Fuse, fingerprint
from serving.gateway.queue import RECALLED_AT_ONCE, Ticket, VersionLine
from serving.gateway.retry import (
    CROWD_S,
    LAG_S,
    LEAST,
    OCCUPIED_S,
    SHARE,
    SILENT_LEAST_S,
    SILENT_TIMES,
    TRIAL_LEAST_S,
    TRIAL_S,
    WINDOW_S,
    YOUNG_S,
    Patience,
    Retry,
    Trials,
    Turns,
    budget,
)
from serving.gateway.routing import TRIPS, TRY_FIRST_S, TRY_LONGEST_S, Upstream
from serving.gateway.state import Fleet


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


async def test_who_waits_goes_before_a_newcomer_also_where_places_were_added() -> None:
    places = 1
    turns = Turns(lambda: places)
    await turns.take()
    first = asyncio.create_task(turns.take())
    await asyncio.sleep(0)
    places = 2
    second = asyncio.create_task(turns.take())
    for _ in range(3):
        await asyncio.sleep(0)
    assert first.done() and not second.done()
    turns.give()
    await second
    turns.give()
    turns.give()
    assert turns.idle


async def test_second_chances_are_given_one_at_a_time_on_each_engine() -> None:
    trials = Trials()
    homes = ["a", "b", "a", "a"]
    chances = [Retry(budget(lambda: 1000), trials) for _ in homes]
    tasks = [asyncio.create_task(c.turn(lambda i=i: homes[i])) for i, c in enumerate(chances)]  # type: ignore[misc]
    await asyncio.sleep(0)
    assert [t.done() for t in tasks] == [True, True, False, False] and trials.free(4) == 2
    assert chances[0].sent() > 0 and chances[1].sent() > 0
    chances[1].close()
    chances[1].close()
    await asyncio.sleep(0)
    assert [t.done() for t in tasks] == [True, True, False, False] and trials.free(4) == 3
    homes[2:] = "c", "c"  # the one they waited for is gone
    chances[0].close()
    for _ in range(9):
        await asyncio.sleep(0)
    assert tasks[2].done() and not tasks[3].done() and trials.free(4) == 3
    for chance in chances:
        chance.close()
    await asyncio.gather(*tasks)
    chances[3].close()
    assert trials.free(4) == 4


@pytest.mark.parametrize("holder_first", [False, True])
@pytest.mark.parametrize("at_once", [False, True])
async def test_who_leaves_while_it_waits_for_its_trial_leaves_nothing_behind(holder_first: bool, at_once: bool) -> None:
    trials = Trials()
    first, second = (Retry(budget(lambda: 1000), trials) for _ in range(2))
    await first.turn(lambda: "a")
    waiting = asyncio.create_task(second.turn(lambda: "a"))
    await asyncio.sleep(0)
    if holder_first:
        first.close()
    waiting.cancel()
    if at_once:
        first.close()
    assert await asyncio.gather(waiting, return_exceptions=True) and waiting.cancelled()
    second.close()
    first.close()
    assert trials.free(1) == 1


async def test_retries_that_become_suspects_do_not_stand_in_the_way_of_who_is_on_trial() -> None:
    """They would wait for the trial with a place among the retries, and whoever has the trial for such a place."""
    line = VersionLine("m@v")
    places = [Retry(line.retries, line.trials) for _ in range(LEAST)]
    for place in places:
        await place.turn(None)
    on_trial = Retry(line.retries, line.trials)
    chances = [on_trial, *places]
    tasks = [asyncio.create_task(chance.turn(lambda: "a")) for chance in chances]
    for chance, task in zip(chances, tasks, strict=True):
        for _ in range(9):
            await asyncio.sleep(0)
        assert task.done()
        chance.close()
    assert (line.retries.free(), line.trials.free(1), line.trials.waiting) == (LEAST, 1, 0)


async def test_who_is_told_that_another_is_on_trial_there_keeps_its_turn_and_asks_again_later() -> None:
    trials = Trials()
    chance = Retry(budget(lambda: 0), trials)
    await chance.turn(lambda: "a")
    chance.occupied()
    with mock.patch("serving.gateway.retry.asyncio.sleep") as pause:
        await chance.turn(lambda: "a")
        await chance.turn(lambda: "a")
    pause.assert_awaited_once_with(OCCUPIED_S)
    assert trials.free(1) == 0


async def test_who_was_cleared_while_it_kept_its_turn_gives_it_to_the_next() -> None:
    trials = Trials()
    chance = Retry(budget(lambda: 0), trials)
    await chance.turn(lambda: "a")
    chance.occupied()
    await chance.turn(None)
    assert trials.free(1) == 1
    assert (chance.sent(), chance.trial_s) == (0, 0)
    chance.close()


async def test_who_is_on_trial_says_so_while_nobody_else_can_be_and_once_its_door_has_let_it_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A gateway that is busy notices the death late, when its turn here is over; the door's is not."""
    now = [100.0]
    monkeypatch.setattr("serving.gateway.retry.time.monotonic", lambda: now[0])
    chance = Retry(budget(lambda: 0), Trials())
    await chance.turn(lambda: "a")
    alone_s = chance.sent()
    now[0] += alone_s / 2
    assert (chance.trial_s, chance.outside) == (0, False), "nobody knows whether doors tell"
    chance.let_in()
    now[0] += alone_s / 2
    chance._give_turn()  # what the timer does
    assert (chance.trial_s, chance.outside) == (alone_s / 2, False)
    now[0] += alone_s
    assert (chance.trial_s, chance.outside) == (0, False), "another one may be on trial there"
    await chance.turn(lambda: "b")
    chance.sent()
    assert (chance.trial_s, chance.outside) == (0, True)
    chance.close()
    await chance.turn(None)
    chance.sent()
    assert (chance.trial_s, chance.outside) == (0, False), "it is not on trial"
    chance.close()


async def test_newcomers_under_suspicion_wait_for_their_trial_in_the_bounds_of_the_queue() -> None:
    line = VersionLine("m@v")
    line.update([endpoint("a")], only_add=False)
    newcomer = Ticket(since=0.0)
    newcomer.suspicion = 7
    assert not line.admit_suspect(newcomer, others=1, max_queue=0)  # nobody is on trial: it need not wait
    chances = [Retry(line.retries, line.trials) for _ in range(3)]
    tasks = [asyncio.create_task(chance.turn(lambda: "a")) for chance in chances]
    await asyncio.sleep(0)
    assert line.waiting == 2
    assert line.admit_suspect(newcomer, others=0, max_queue=3)
    with pytest.raises(QueueFull, match="3 requests already wait"):
        line.admit_suspect(newcomer, others=1, max_queue=3)
    for chance, task in zip(chances, tasks, strict=True):
        await task
        chance.close()
    assert line.waiting == 0


async def test_those_who_wait_for_the_trials_of_others_are_bounded_on_their_own_and_count_against_nobody_else() -> None:
    fleet = Fleet()
    limits = {"max_queue": 2, "max_wait_s": 9, "request_timeout_s": 9, "max_body_bytes": 9}
    fleet.set_catalog({"models": [{"name": "m", "versions": ["v", "w"], "limits": limits}]})
    line, other, model = fleet.lines["m@v"], fleet.lines["m@w"], fleet.models["m"]
    line.update([endpoint("a")], only_add=False)
    newcomer = Ticket(since=0.0)
    newcomer.suspicion = 7
    await line.trials.take(lambda: "a")
    with line.trials.others_first():
        line.admit_suspect(newcomer, others=0, max_queue=2, put_off=True)
        with other.trials.others_first():
            assert (fleet.waiting(model), fleet.put_off(model)) == (0, 2)
            line.admit_suspect(newcomer, others=1, max_queue=2)
            with pytest.raises(QueueFull, match="2 requests already wait"):
                line.admit_suspect(newcomer, others=1, max_queue=2, put_off=True)
    assert fleet.put_off(model) == 0
    line.trials.give("a")


async def test_the_more_wait_for_an_engine_the_shorter_are_the_trials_there() -> None:
    trials = Trials()
    lengths = []
    for others in (0, 59, 500):
        first, *rest = (Retry(budget(lambda: 1000), trials) for _ in range(1 + others))
        await first.turn(lambda: "a")
        tasks = [asyncio.create_task(r.turn(lambda: "a")) for r in rest]
        await asyncio.sleep(0)
        lengths.append(first.sent())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        first.close()
    assert lengths == [s + LAG_S for s in (TRIAL_S, CROWD_S / 60, TRIAL_LEAST_S)]


async def test_answers_that_take_long_keep_no_other_retry_waiting() -> None:
    line = VersionLine("m@v")
    line.update([endpoint("a")], only_add=False)
    chances = [Retry(line.retries, line.trials) for _ in range(2 * LEAST)]
    with mock.patch("serving.gateway.retry.TRIAL_S", 0.001):
        for chance in chances:
            await chance.turn(lambda: "a")
            assert chance.sent() == 0.001 + LAG_S
    while line.trials.free(1) == 0:
        await asyncio.sleep(0.001)
    assert line.retries.free() == LEAST


def test_copies_of_one_suspect_have_one_home_at_all_gateways_and_others_have_others() -> None:
    here, there = VersionLine("m@v", "x"), VersionLine("m@v", "y")
    engines = [endpoint(name) for name in "abcd"]
    here.update(engines, only_add=False)
    there.update(engines[::-1], only_add=False)

    def home(line: VersionLine, suspicion: int, **more: Any) -> str:
        ticket = Ticket(since=0.0)
        ticket.suspicion = suspicion
        ticket.avoid = more.get("avoid", frozenset())
        return line.home(ticket)

    homes = [home(here, 1000 + i) for i in range(64)]
    assert homes == [home(there, 1000 + i) for i in range(64)]
    assert set(homes) == set("abcd")
    first = homes[0]
    next_ = home(here, 1000, avoid=frozenset(first))
    assert next_ and next_ != first
    for _ in range(8):
        here.upstreams[first].bind(0.0)
    assert home(here, 1000) == next_, "the same as if it were gone, while it has no room"
    assert home(here, 1000, avoid=frozenset("abcd")) == next_, "better than none"
    here.update([], only_add=False)
    assert home(here, 1000) == ""


async def test_a_suspect_that_waits_for_its_engine_keeps_no_place_elsewhere() -> None:
    line = VersionLine("m@v")
    line.update([endpoint("a"), endpoint("b")], only_add=False)
    suspect = Ticket(since=0.0)
    suspect.suspicion = 7
    home = line.home(suspect)
    free = next(i for i in "ab" if i != home)
    line.upstreams[home].broken_until = line.upstreams[home].careful_until = float("inf")
    for _ in range(7):
        line.upstreams[free].bind(0.0)
    suspect.avoid = frozenset(free)
    waiting = asyncio.create_task(line.take(suspect, others=0, max_queue=8, max_wait_s=60, again=True))
    await asyncio.sleep(0)
    assert (await line.take(Ticket(since=1.0), others=0, max_queue=8, max_wait_s=0.1)).endpoint.id == free
    assert not waiting.done()
    line.upstreams[home].broken_until = line.upstreams[home].careful_until = 0.0
    line.pump()
    assert (await waiting).endpoint.id == home


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
        self.charge: Charge | None = None
        self.recalled = False

    def recall(self) -> None:
        self.recalled = True

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


def test_silent_streams_at_a_well_engine_send_no_more_of_the_lost_elsewhere_than_there_are_trials() -> None:
    line = VersionLine("m@v")
    line.update([endpoint("a"), endpoint("b"), endpoint("c")], only_add=False)
    line.running = 50  # so that there are ten turns
    silent, lost = [Attempt(0.0) for _ in range(4)], [Attempt(float(i), stream=False) for i in range(5)]
    line.upstreams["a"].awaiting |= {*silent}
    line.upstreams["b"].awaiting |= {*lost}
    sick = msgspec.structs.replace(endpoint("b"), state=State.SUSPECT)
    line.update([endpoint("a"), sick, endpoint("c")], only_add=False)
    assert line.give_up_on_the_silent(SILENT_LEAST_S + 1) == 6
    assert [a.gave_up for a in silent] == [False] * 4
    assert [a.gave_up for a in lost] == [True, True, None, None, None], "one for each engine that is well"


def test_attempts_at_one_that_left_the_table_go_elsewhere() -> None:
    line = VersionLine("m@v")
    line.update([endpoint("a"), endpoint("b")], only_add=False)
    attempt = Attempt(99.0, stream=False)
    line.upstreams["a"].bind(99)
    line.upstreams["a"].awaiting.add(attempt)
    line.update([endpoint("b")], only_add=True)
    assert line.give_up_on_the_silent(100) == 0
    line.update([endpoint("b")], only_add=False)
    assert line.give_up_on_the_silent(100) == 1
    assert attempt.gave_up is False, "nobody knows that its engine died"


async def test_one_that_comes_back_to_the_table_is_the_same_one() -> None:
    line = VersionLine("m@v")
    line.update([endpoint("a")], only_add=False)
    ticket, attempt = Ticket(since=0.0), Attempt(99.0)
    upstream = await line.take(ticket, others=0, max_queue=8, max_wait_s=0.1)
    upstream.awaiting.add(attempt)
    line.update([], only_add=False)
    line.update([endpoint("a"), endpoint("b")], only_add=False)
    assert line.give_up_on_the_silent(100) == 0 and attempt.gave_up is None
    assert line.upstreams["a"] is upstream and upstream.sent == 1
    line.release(ticket)
    assert upstream.sent == 0


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


async def test_copies_of_a_suspect_are_recalled_while_they_are_young_and_not_on_trial() -> None:
    line, fuse, news = VersionLine("m@v"), Fuse(), []
    fuse.on_suspects = lambda: news.append(1)
    line.update([endpoint("a")], only_add=False)
    copy, last, old, trial, another = (
        Attempt(99.0),
        Attempt(99.0, patient=True),
        Attempt(99.0 - YOUNG_S),
        Attempt(99.0),
        Attempt(99.0),
    )
    copy.charge = last.charge = old.charge = charge(fuse)
    another.charge = charge(fuse, max_tokens=7)
    line.upstreams["a"].awaiting |= {copy, last, old, trial, another}
    await line.recall_suspects(100.0)
    assert not news and not copy.recalled
    charge(fuse).died("b")
    await line.recall_suspects(100.0)
    assert news and [a.recalled for a in (copy, last, old, trial, another)] == [True, False, False, False, False]


async def test_suspects_among_many_are_looked_for_a_few_at_a_time_while_everything_else_goes_on() -> None:
    """A fingerprint takes 0.3 ms of a long prompt: all of them at once would hold up every stream."""
    line, fuse, rounds = VersionLine("m@v"), Fuse(), [0]
    line.update([endpoint("a")], only_add=False)
    charge(fuse).died("b")
    looked_at: list[int] = []

    class Looked(Charge):
        @property
        def suspicion(self) -> int | None:
            looked_at.append(rounds[0])
            return super().suspicion

    attempts = [Attempt(99.0) for _ in range(5 * RECALLED_AT_ONCE)]
    for attempt in attempts:
        attempt.charge = Looked(fuse, "m@v", "/v1/chat/completions", None, CHAT)
    ended = None
    line.upstreams["a"].awaiting |= {*attempts}
    looking = asyncio.create_task(line.recall_suspects(100.0))
    while not looking.done():
        await asyncio.sleep(0)
        if not rounds[0]:
            ended = next(a for a in attempts if not a.recalled)
            line.upstreams["a"].awaiting.discard(ended)
        rounds[0] += 1
    await looking
    assert max(Counter(looked_at).values()) == RECALLED_AT_ONCE and len(looked_at) == len(attempts) - 1
    assert [a for a in attempts if not a.recalled] == [ended], "it has ended meanwhile"


def test_a_blown_fuse_stays_so_whichever_engine_is_told_of_again() -> None:
    fuse = Fuse()
    for engine in ("a", "b", "a", "b", "c", "a"):
        deaths = fuse.died("print", engine)
    assert deaths >= DEATHS and fuse.blown("print")


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
    assert here.told().deaths == {}


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


def test_who_was_on_trial_answers_for_the_engines_that_died_with_it_inside() -> None:
    here, there = Fuse(), Fuse()
    for innocent in ("one", "other"):
        here.died(innocent, "a")
        here.died(innocent, "b")
    there.died("guilty", "a")
    there.died("guilty", "b", 0.2)
    assert here.blown("one") and there.blown("guilty")
    here.hear([there.told()])
    assert not here.blown("one") and not here.blown("other") and here.blown("guilty")
    assert (here.excused("one"), there.excused("guilty")) == (2, 0)
    assert here.suspected("one"), "two may be guilty of the first death"
    here.died("one", "c", 0.1)
    assert here.blown("one"), "it is tried once more, and no more"


def test_what_a_guilty_one_did_on_trial_makes_nobody_else_suspect_once_they_were_heard() -> None:
    """Else the next one that ends an engine would have it as a scapegoat, on trial there in that moment."""
    fuse = Fuse()
    fuse.died("guilty", "a")
    fuse.died("innocent", "b")
    fuse.died("guilty", "b", 0.2)
    assert fuse.pending("guilty") and not fuse.blown("guilty") and fuse.suspected("innocent")
    fuse.passed("innocent")
    assert fuse.blown("guilty") and not fuse.pending("guilty") and not fuse.suspected("innocent")
    fuse.died("innocent", "c", 0.1)  # whoever ended it came in while that was not known yet
    assert fuse.suspected("innocent") and not fuse.blown("innocent") and fuse.excused("innocent") == 1
    fuse.died("innocent", "d", 0.1)
    assert fuse.blown("innocent")


def test_a_newcomer_that_ends_the_engine_of_a_trial_is_guilty_and_not_whoever_was_on_trial() -> None:
    """They are at two gateways. Nobody is refused before the newcomer has had its own trial."""
    here, there = Fuse(), Fuse()

    def news() -> None:
        here.hear([there.told()])
        there.hear([here.told()])

    here.died("innocent", "a")
    here.died("innocent", "b", 0.2)
    here.died("beside", "a")
    here.died("beside", "b")
    there.died("newcomer", "b")
    news()
    for fuse in (here, there):
        assert [fuse.pending(p) for p in ("innocent", "beside", "newcomer")] == [True, True, False]
        assert not fuse.blown("innocent") and fuse.suspected("newcomer")
    there.died("newcomer", "c", 0.2)
    news()
    for fuse in (here, there):
        assert [fuse.blown(p) for p in ("innocent", "beside", "newcomer")] == [False, False, True]
        assert not fuse.pending("innocent") and not fuse.pending("beside")
        assert fuse.suspected("innocent"), "of the first death"


def test_nobody_waits_for_ever_for_others_to_be_heard() -> None:
    """A client may have left before its request was tried again."""
    now = [0.0]
    fuse = Fuse(lambda: now[0])
    fuse.died("gone", "b")
    fuse.died("guilty", "a")
    fuse.died("guilty", "b", 0.2)
    now[0] = HEARD_S - 0.1
    assert fuse.pending("guilty")
    now[0] = HEARD_S
    assert not fuse.pending("guilty") and fuse.blown("guilty")


def test_nobody_is_inside_more_than_four_whoever_answers_for_them() -> None:
    """Copies that come at once have each a scapegoat, if one is on trial wherever they come."""
    fuse = Fuse()
    for engine in "abcd":
        assert not fuse.blown("copied")
        fuse.died("copied", engine)
        fuse.died(f"scapegoat-{engine}", "earlier")
        fuse.died(f"scapegoat-{engine}", engine, 0.2)
    assert fuse.blown("copied")


def test_of_two_that_say_they_were_on_trial_the_one_that_was_there_before_is_guilty() -> None:
    """Doors let one in at a time: the other came when the engine was dead already."""
    here, there = Fuse(), Fuse()
    for fuse, print_, trial_s in (here, "late", 0.01), (there, "guilty", 0.2):
        fuse.died(print_, "a")
        fuse.died(print_, "b", trial_s)
    assert here.blown("late")
    here.hear([there.told()])
    there.hear([here.told()])
    assert [f.blown("late") for f in (here, there)] == [False, False]
    assert [f.blown("guilty") for f in (here, there)] == [True, True]


def test_only_who_had_no_answer_yet_goes_on_trial() -> None:
    """Clients send again what was cut, all at once: they need not wait for each other."""
    here, there = Fuse(), Fuse()
    here.died("cut", "a", begun=True)
    here.died("silent", "a")
    there.hear([here.told()])
    for fuse in (here, there):
        assert [fuse.suspected(p) for p in ("cut", "silent", "another")] == [False, True, False]
    there.died("cut", "b", begun=True)
    assert there.pending("cut"), "but it counts"
    there.passed("silent")
    assert there.blown("cut") and not there.suspected("silent")


def test_one_death_on_trial_is_no_guilt_and_who_survives_explains_nothing_any_more() -> None:
    fuse = Fuse()
    fuse.died("first", "b", 0.2)
    assert not fuse.blown("first")
    for engine in "ab":
        fuse.died("beside", engine)
    fuse.died("first", "a")
    assert fuse.blown("first") and not fuse.blown("beside")
    fuse.survived("first")
    assert not fuse.blown("first") and fuse.blown("beside")


async def test_a_trial_begins_when_the_door_has_let_it_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an engine that has no time, that may be after its turn was over: what ends it then has had no trial yet."""
    monkeypatch.setattr("serving.gateway.retry.TRIAL_S", 0.05)
    trials, passed = Trials(), asyncio.Event()
    trials.doors_tell = True
    chance = Retry(budget(lambda: 0), trials, passed.set)
    await chance.turn(lambda: "a")
    chance.sent()
    while trials.homes:
        await asyncio.sleep(0)
    assert chance._timer is None and not passed.is_set()
    chance.let_in()
    assert chance.trial_s < 0.05 and not passed.is_set()
    await asyncio.wait_for(passed.wait(), 30)


def test_nobody_is_refused_by_a_verdict_whose_time_is_over() -> None:
    now = [0.0]
    fuse = Fuse(lambda: now[0])
    for engine in ("e1", "e2"):
        fuse.died("q", engine)
        fuse.passed("q")
        fuse.died("p", engine, 0.5 if engine == "e2" else 0.0)
    fuse.died("newcomer", "e2")  # and its client left
    assert not fuse.blown("q")
    now[0] += HEARD_S + 1
    assert [fuse.blown("q") for _ in range(2)] == [False, False]
    assert fuse.blown("p")


def test_engines_are_told_in_the_order_of_their_deaths() -> None:
    fuse = Fuse()
    for engine in ("e9", "e1", "e5"):
        fuse.died("p", engine, begun=True)
    assert fuse.told().deaths == {"p": ("e9", "e1", "e5")}


def test_what_is_remembered_and_told_is_bounded() -> None:
    fuse = Fuse()
    for i in range(MOST + 10):
        fuse.died(str(i), "a")
    assert len(fuse._own) == MOST and len(fuse.told().deaths) == TOLD


@pytest.mark.parametrize("count", [0, 3])
def test_an_unarmed_fuse_computes_nothing(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.gateway.fuse.fingerprint", lambda *_: pytest.fail("a fingerprint was made"))
    fuse = Fuse()
    for _ in range(count):
        asked = charge(fuse)
        assert not asked.blown
        asked.survived()

"""Is an engine well? What proves it, how long it may prove nothing, and that a busy one is never taken for a dead one."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.engine.health import UNREAD_S, Judgement, Limits, Look, Memory, judge, limit_of, slow_step_s

LIMITS = Limits()
EVERY_S = 0.5


class Engine:
    """An engine as its watch sees it, twice a second; its clock is set by hand."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        self.now, self.limits = 1000.0, limits
        self.memory = Memory(proved_at=self.now)
        self.steps = 0.0
        self.judged = Judgement("ok", self.memory)
        self.probes = 0

    def looks(self, for_s: float, *, steps_a_look: float = 0, **seen: Any) -> str:
        """What the last look says, as `verdict cause`."""
        for _ in range(round(for_s / EVERY_S)):
            self.now += EVERY_S
            self.steps += steps_a_look
            self.judged = judge(Look(**{"mark": (self.steps,)} | seen), self.limits, self.memory, self.now)
            self.memory = self.judged.memory
            self.probes += self.judged.probe
        return f"{self.judged.verdict} {self.judged.cause}".strip()


def busy(**more: Any) -> dict[str, Any]:
    return {"in_flight": 3, "inside": 3, **more}


def test_an_engine_that_makes_steps_is_well_however_loaded_it_is() -> None:
    engine = Engine()
    assert engine.looks(600, steps_a_look=50, in_flight=256, inside=400) == "ok"
    assert engine.probes == 0


def test_work_without_a_step_is_suspect_in_five_seconds_and_failed_when_it_lasts() -> None:
    engine = Engine()
    engine.looks(10, steps_a_look=20, **busy())
    assert engine.looks(LIMITS.stuck_s - EVERY_S, **busy()) == "ok"
    assert engine.looks(EVERY_S, **busy()) == "suspect stuck"
    assert engine.looks(LIMITS.replace_s - LIMITS.stuck_s, **busy()) == "failed stuck"


def test_the_watch_is_told_when_time_is_up_and_need_not_wait_for_its_next_look() -> None:
    engine = Engine()
    engine.looks(10, steps_a_look=20, **busy())
    assert engine.judged.turns_s == math.inf
    engine.looks(1, **busy())
    still, before, turns_s = Look(mark=(engine.steps,), **busy()), engine.judged, engine.judged.turns_s
    assert judge(still, LIMITS, before.memory, engine.now + turns_s - 1e-6).verdict == "ok"
    assert judge(still, LIMITS, before.memory, engine.now + turns_s + 1e-6).verdict == "suspect"
    engine.looks(LIMITS.stuck_s, **busy())
    assert engine.judged.turns_s == pytest.approx(LIMITS.replace_s - LIMITS.stuck_s - 1)


def test_counters_that_cannot_be_read_are_no_reason_to_look_more_often() -> None:
    engine = Engine()
    engine.looks(10, steps_a_look=20, **busy())
    for _ in range(12):
        engine.looks(EVERY_S, mark=None, **busy())
        assert engine.judged.verdict == "ok" and engine.judged.turns_s > EVERY_S


def test_a_suspect_that_goes_on_is_well_again() -> None:
    engine = Engine()
    assert engine.looks(6, **busy()) == "suspect stuck"
    assert engine.looks(EVERY_S, steps_a_look=1, **busy()) == "ok"


def test_a_pause_of_the_whole_machine_is_held_against_no_engine() -> None:
    engine = Engine()
    engine.looks(10, steps_a_look=20, **busy())
    engine.now += 60
    assert engine.looks(EVERY_S, mark=None, **busy()) == "ok"
    assert engine.looks(LIMITS.stuck_s, **busy()) == "suspect stuck", "it is watched as before"


def test_counters_that_could_not_be_read_say_nothing_for_a_while() -> None:
    engine = Engine()
    engine.looks(10, steps_a_look=20, **busy())
    assert engine.looks(2 * LIMITS.stuck_s - EVERY_S, mark=None, **busy()) == "ok"
    assert engine.looks(EVERY_S, mark=None, **busy()) == "suspect stuck"
    engine = Engine()
    engine.looks(10, steps_a_look=20, **busy())
    engine.looks(UNREAD_S + 1, mark=None, **busy())
    assert engine.looks(1, **busy()) == "suspect stuck", "read again, and nothing has moved since"


def test_a_suspect_whose_counters_cannot_be_read_stays_one() -> None:
    engine = Engine()
    engine.looks(10, steps_a_look=20, **busy())
    engine.looks(LIMITS.stuck_s - 2 * EVERY_S, **busy())
    assert engine.looks(UNREAD_S, mark=None, **busy()) == "suspect stuck"
    for _ in range(round(3 * LIMITS.stuck_s / EVERY_S)):
        assert engine.looks(EVERY_S, mark=None, **busy()).startswith(("suspect", "failed"))


def test_what_has_an_engine_replaced_whose_counters_cannot_be_read_is_how_long_that_lasts() -> None:
    """A step may be slow, and end while nobody can see it."""
    engine = Engine()
    engine.looks(10, steps_a_look=20, **busy())
    engine.looks(LIMITS.stuck_s - EVERY_S, **busy())
    assert engine.looks(LIMITS.replace_s - EVERY_S, mark=None, **busy()) == "suspect stuck"
    assert engine.looks(EVERY_S, mark=None, **busy()) == "failed stuck"
    assert "no word of its steps for 20.0 s" in engine.judged.why


def test_a_token_that_is_late_while_the_counters_cannot_be_read_says_nothing_for_a_while() -> None:
    engine = Engine()
    engine.looks(LIMITS.probe_every_s)
    assert engine.probes == 1
    assert engine.looks(2 * LIMITS.stuck_s - EVERY_S, mark=None, probe="pending") == "ok"
    assert engine.looks(EVERY_S, mark=None, probe="pending") == "suspect stuck"


def test_anything_that_only_its_core_moves_is_a_step() -> None:
    """A long prefill in chunks yields no token and counts as no iteration, but its KV cache fills."""
    engine = Engine()
    for used in range(100):
        assert engine.looks(EVERY_S, mark=(0.0, used / 100), **busy()) == "ok"


def test_slow_steps_are_given_ten_times_their_length() -> None:
    engine = Engine()
    for _ in range(60):
        engine.looks(2.5, **busy())
        engine.looks(EVERY_S, steps_a_look=1, **busy())
    assert 3 <= slow_step_s(engine.memory) < 6.1
    assert engine.looks(29, **busy()) == "ok"
    assert engine.looks(34, **busy()) == "suspect stuck"


def test_a_hitch_among_many_steps_is_not_the_measure() -> None:
    engine = Engine()
    engine.looks(120, steps_a_look=50, **busy())
    engine.looks(3.5, **busy())
    engine.looks(60, steps_a_look=50, **busy())
    assert limit_of(LIMITS, engine.memory) == LIMITS.stuck_s


@pytest.mark.parametrize("a_second", [2, 5, 20, 50])
def test_one_hang_does_not_make_the_next_one_usual(a_second: int) -> None:
    engine = Engine()

    def works(for_s: float) -> None:  # counters are read once a second
        for _ in range(round(for_s)):
            engine.looks(EVERY_S, mark=None, **busy())
            assert engine.looks(EVERY_S, steps_a_look=a_second, **busy()) == "ok"

    works(600)
    before = limit_of(LIMITS, engine.memory)
    assert engine.looks(19, **busy()) == "suspect stuck"
    works(60)
    assert limit_of(LIMITS, engine.memory) <= 2 * before


def test_the_first_step_may_compile_for_long_and_is_not_the_measure() -> None:
    engine = Engine()
    engine.looks(19, **busy())
    engine.looks(10, steps_a_look=20, **busy())
    assert limit_of(LIMITS, engine.memory) <= 3 * LIMITS.stuck_s


def test_an_idle_engine_is_asked_for_a_token_now_and_then() -> None:
    engine = Engine()
    engine.looks(LIMITS.probe_every_s - EVERY_S)
    assert engine.probes == 0
    engine.looks(EVERY_S)
    assert engine.probes == 1
    engine.looks(EVERY_S, probe="ok")
    engine.looks(LIMITS.probe_every_s - EVERY_S)
    assert engine.probes == 1


def test_an_idle_engine_that_gives_no_token_is_found_out() -> None:
    engine = Engine()
    engine.looks(LIMITS.probe_every_s)
    assert engine.looks(LIMITS.stuck_s, probe="pending") == "suspect stuck"
    assert engine.looks(LIMITS.replace_s, probe="pending") == "failed stuck"


def test_one_that_refuses_the_token_is_suspect_at_once_asked_again_and_failed_in_seconds() -> None:
    engine = Engine()
    engine.looks(LIMITS.probe_every_s)
    assert engine.looks(EVERY_S, probe="refused") == "suspect refuses"
    engine.looks(1.5)
    assert engine.probes >= 2
    assert engine.looks(LIMITS.sick_s, probe="refused") == "failed refuses"


def test_one_refusal_and_then_a_token_is_well() -> None:
    engine = Engine()
    engine.looks(LIMITS.probe_every_s)
    engine.looks(EVERY_S, probe="refused")
    assert engine.looks(EVERY_S, probe="ok") == "ok"
    assert engine.looks(5) == "ok"


def test_work_that_the_engine_does_not_know_of_is_a_slow_client_or_a_dead_core_and_a_token_tells() -> None:
    """A client that does not read keeps its request behind the door when the core has long finished it. A core that stood
    still before the request came never counted it."""
    slow_client = Engine()
    for _ in range(60):
        slow_client.looks(EVERY_S, in_flight=1, inside=0, probe="ok" if slow_client.judged.probe else "none")
        assert slow_client.judged.verdict == "ok"
    dead_core = Engine()
    dead_core.looks(8)
    said = [dead_core.looks(EVERY_S, in_flight=1, probe="pending" if dead_core.probes else "none") for _ in range(10)]
    assert said.index("suspect stuck") * EVERY_S <= LIMITS.stuck_s + EVERY_S


def test_requests_that_come_and_go_without_a_step_are_a_reason_to_ask() -> None:
    """Every generation answers 500 at once: nobody is ever seen inside."""
    engine = Engine()
    engine.looks(3)
    engine.looks(1.0, entered=5)
    assert engine.probes == 1
    assert engine.looks(EVERY_S, entered=9, probe="refused") == "suspect refuses"
    works = Engine()
    for i in range(40):
        works.looks(EVERY_S, entered=3 * i, steps_a_look=2)
    assert works.probes == 0


def test_a_server_that_does_not_answer_is_suspect_then_failed() -> None:
    engine = Engine()
    assert engine.looks(EVERY_S, answers=False, waited_s=1.0, mark=None) == "ok"
    assert engine.looks(LIMITS.stuck_s - EVERY_S, answers=False, waited_s=1.0, mark=None) == "suspect silent"
    assert engine.looks(LIMITS.replace_s, answers=False, waited_s=1.0, mark=None) == "failed silent"


def test_a_watch_that_was_held_up_itself_accuses_nobody() -> None:
    engine = Engine()
    engine.looks(5, steps_a_look=9, **busy())
    engine.now += 30
    assert engine.looks(EVERY_S, answers=False, waited_s=1.0, mark=None) == "ok"
    engine.now += 30
    assert engine.looks(EVERY_S, steps_a_look=1, **busy()) == "ok"


def test_who_says_that_it_is_not_well_is_believed() -> None:
    engine = Engine()
    assert engine.looks(EVERY_S, healthy=False, **busy()) == "suspect health"
    assert engine.looks(LIMITS.sick_s, healthy=False, **busy()) == "failed health"


def test_a_dead_process_is_failed_at_once() -> None:
    assert Engine().looks(EVERY_S, alive=False) == "failed process"


def test_who_sleeps_is_not_woken_and_not_accused() -> None:
    engine = Engine()
    assert engine.looks(600, asleep=True) == "ok"
    assert engine.probes == 0


looks = st.builds(
    Look,
    answers=st.booleans(),
    waited_s=st.floats(0, 1),
    healthy=st.sampled_from([True, True, True, False]),
    in_flight=st.integers(0, 3),
    inside=st.integers(0, 3),
    mark=st.none() | st.tuples(st.integers(0, 2).map(float)),
    probe=st.sampled_from(["none", "none", "pending", "ok", "refused"]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(looks, st.floats(0.1, 3)), max_size=40))
def test_proof_makes_well_and_only_what_lasts_makes_failed(seen: list[tuple[Look, float]]) -> None:
    now, memory, trouble_s = 1000.0, Memory(proved_at=1000.0), 0.0
    for look, after_s in seen:
        now += after_s
        moved = look.mark is not None and bool(memory.mark) and look.mark != memory.mark
        judged = judge(look, LIMITS, memory, now)
        memory = judged.memory
        if look.answers and look.healthy and look.probe != "refused" and (moved or look.probe == "ok"):
            assert judged.verdict == "ok"
            trouble_s = 0.0
        else:
            trouble_s += after_s
        assert (judged.verdict == "ok") == (not judged.cause)
        if judged.verdict == "failed":
            assert trouble_s + 1 >= LIMITS.sick_s
        if judged.probe:
            assert look.probe != "pending" and look.answers
        assert all(w >= 0 for w in memory.steps)


@pytest.mark.parametrize("step_s", [0.002, 0.1, 1.0, 8.0])
def test_the_limit_follows_the_engine(step_s: float) -> None:
    engine = Engine()
    per_look = EVERY_S / step_s
    for i in range(1, 400):
        moved = int(i * per_look) - int((i - 1) * per_look)
        assert engine.looks(EVERY_S, steps_a_look=moved, **busy()) in ("ok", "suspect stuck")
    assert max(4.0, 10 * step_s) <= limit_of(LIMITS, engine.memory) <= max(4.0, 21 * step_s)

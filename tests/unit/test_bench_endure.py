"""What the bench takes for growth."""

from __future__ import annotations

from bench.endure import Grown, judge, slope
from bench.report import Report

HOUR = [float(s) for s in range(0, 3600, 60)]


def process(per_h: float, *, filled: float = 0.0, files: float = 0.0) -> Grown:
    """One that grows so many MiB an hour, with a cache of `filled` MiB that is full after five minutes, and noise."""
    memory = [100 + per_h * s / 3600 + filled * min(1.0, s / 300) + (s % 70) / 100 for s in HOUR]
    return Grown("p", HOUR, memory, [10 + files * s / 3600 + s % 40 / 10 for s in HOUR])


def bars(*processes: Grown) -> dict[str, bool]:
    result = Report()
    judge(result, dict(enumerate(processes)), judged=True)
    return {bar.name: bar.ok for bar in result.bars}


def test_a_leak_is_told_from_a_cache_that_fills_once() -> None:
    assert 1.9 < process(2.0).memory_per_h < 2.1
    assert bars(process(0.0, filled=5.0), process(0.5)) == {"memory_mib_per_h": True, "files_more": True}
    assert bars(process(0.0), process(2.0)) == {"memory_mib_per_h": False, "files_more": True}


def test_a_process_that_missed_a_look_is_judged_and_one_that_was_there_for_a_while_is_not() -> None:
    missed, passing = process(2.0), process(2.0)
    missed = Grown("p", missed.at[1:], missed.memory[1:], missed.files[1:])
    passing = Grown("p", passing.at[:50], passing.memory[:50], passing.files[:50])
    assert not bars(process(0.0), missed)["memory_mib_per_h"]
    assert bars(process(0.0), passing)["memory_mib_per_h"]


def test_files_that_stay_open_are_seen_between_those_that_come_and_go() -> None:
    assert bars(process(0.0, files=3.0))["files_more"]
    assert not bars(process(0.0, files=60.0))["files_more"]


def test_too_few_looks_say_nothing() -> None:
    assert slope([1.0], [5.0]) == 0.0
    assert bars() == {"memory_mib_per_h": False, "files_more": False}

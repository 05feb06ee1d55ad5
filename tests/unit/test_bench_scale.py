"""What the figures of `bench.scale` say, on recordings made by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from bench import contention, scale
from bench.contention import Script, growth_mib, retry_factors, served_by_party, waiting_shares, waits_s
from bench.elastic import Course, decision_s
from bench.fleet import Metrics, skewed
from bench.plan import Asked
from bench.recording import Recording
from bench.report import Report
from bench.stream import Answer
from serving.fleet.endpoint import Target
from serving.telemetry.metrics import GatewayMetrics, merge

TTFT_S = contention.TTFT_MS / 1e3


def exposition() -> str:
    """What `/metrics` says of two gateways and two engines."""
    texts = []
    for name, ready, draining in (("g1", 3, 1), ("g2", 2, 0)):
        metrics = GatewayMetrics(CollectorRegistry())
        metrics.replicas.labels("busy", "v1", "READY").set(ready)
        metrics.replicas.labels("busy", "v1", "DRAINING").set(draining)
        metrics.replicas.labels("other", "v1", "READY").set(9)
        texts.append((Target(id=f"gateway#{name}", component="gateway", url="", node="n1").joined, metrics.text()))
    for replica, running, waiting in (("a", 8, 2), ("b", 0, 0)):
        text = f'vllm:num_requests_running{{model_name="x"}} {running}\nvllm:num_requests_waiting{{model_name="x"}} {waiting}\n'
        labels = {"model": "busy", "version": "v1", "replica": replica}
        texts.append((Target(id=replica, component="engine", url="", node="n1", labels=labels).joined, text))
    return merge(texts)


def served(due: float, waited: float, party: int = 0) -> Answer:
    answer = Answer(4, due, party)
    answer.status, answer.start, answer.first, answer.end = 200, due, due + waited + TTFT_S, due + waited + 1.0
    return answer


def refused(due: float, promised: float) -> Answer:
    answer = Answer(4, due)
    answer.status, answer.start, answer.end, answer.retry_after_s = 429, due, due, promised
    answer.error = "status 429: queue_full"
    return answer


def recorded(*answers: Answer) -> Recording:
    return Recording.of(answers, began=0.0)


def test_a_promise_is_compared_with_the_wait_of_who_came_nearest() -> None:
    recording = recorded(served(0, 2), refused(1, 4), refused(9, 4), served(10, 8))
    assert retry_factors(recording, waits_s(recording)) == pytest.approx([2, 2])


def test_a_promise_is_as_wrong_when_it_is_too_long_as_when_it_is_too_short() -> None:
    recording = recorded(served(0, 4), refused(0.1, 1), refused(0.1, 16))
    assert retry_factors(recording, waits_s(recording)) == pytest.approx([4, 4])


@pytest.mark.parametrize("answers", [(), (served(0, 1),), (refused(0, 1),), (served(0, 1), refused(0, math.nan))])
def test_without_promises_or_waits_there_is_nothing_to_compare(answers: tuple[Answer, ...]) -> None:
    recording = recorded(*answers)
    assert len(retry_factors(recording, waits_s(recording))) == 0


def test_memory_is_flat_when_it_stops_growing_after_the_first_fifth() -> None:
    assert growth_mib([(t, min(t, 10) * 10.0) for t in range(61)]) == 0
    assert growth_mib([(t, float(t)) for t in range(61)]) == pytest.approx(36, abs=1)
    assert growth_mib([(0, 1.0)]) is None


def test_keys_are_counted_by_who_got_slots_in_the_time_that_counts() -> None:
    recording = recorded(*(served(t, 1, party=t % 2) for t in range(10)), served(3, 60, party=1), refused(3, 1))
    assert served_by_party(recording, 2, 2.0, 8.0) == [3, 3]


def test_answers_are_counted_when_they_end() -> None:
    assert recorded(*(served(t, 1) for t in range(10)), refused(3, 1)).answered_per_s(2.0, 6.0) == 1.0


CHANGES: list[dict[str, Any]] = [
    {"at": 90.0, "before": 1, "after": 3},
    {"at": 95.0, "before": 3, "after": 1},
    {"at": 101.5, "before": 1, "after": 2},
    {"at": 104.0, "before": 2, "after": 3},
    {"at": 120.0, "before": 3, "after": 1},
]


@pytest.mark.parametrize(("count", "seconds"), [(2, 1.5), (3, 4.0), (4, None)])
def test_a_decision_counts_when_it_asks_for_enough(count: int, seconds: float | None) -> None:
    assert decision_s(CHANGES, 100.0, count) == seconds


def test_streams_on_those_that_go_are_what_the_busiest_do_not_carry() -> None:
    course = Course("busy", ready=[3, 1, 1], streams=[{"a": 9, "b": 9, "c": 9}, {"a": 5, "b": 3, "c": 1}, {"a": 5}])
    assert course.on_victims(1) == 4
    assert course.on_victims(2) == 0


def test_metrics_are_read_by_name_and_label() -> None:
    metrics = Metrics(exposition())
    assert metrics.replicas("busy") == 4
    assert metrics.replicas("busy", "READY") == 3
    assert metrics.replicas("nobody") == 0
    assert waiting_shares(metrics) == [0.25]


def test_a_crowd_is_at_the_first_gateway() -> None:
    crowd = skewed([7, 8, 9], 0.9, {"a": "b"})
    assert [(p.gateways, p.weight) for p in crowd] == [((7,), 0.9), ((8, 9), pytest.approx(0.1))]


def test_steps_are_taken_once_and_in_their_order() -> None:
    taken: list[int] = []
    script = Script((0.0, lambda: taken.append(1)), (0.0, lambda: taken.append(2)), (60.0, lambda: taken.append(3)))
    script()
    script()
    assert taken == [1, 2]
    assert len(script.done) == 2


def test_every_bar_belongs_to_one_part() -> None:
    assert [name for part in scale.PARTS for name in part.bars] == list(scale.BARS)


@pytest.mark.parametrize("error", [OSError("gone"), KeyError("gateway")])
def test_a_part_that_fails_misses_its_own_bars_and_no_others(error: Exception) -> None:
    def breaks(*_: Any) -> None:
        raise error

    said: list[str] = []
    bench = type("Bench", (), {"say": staticmethod(said.append)})
    part = scale.Part(("fairness_gap",), breaks, (), ())
    scale.measure(part, [], bench, Asked(quick=False, only=frozenset()), Report())  # type: ignore[arg-type]
    assert said == [f"fairness_gap: {type(error).__name__}: {error}"]


def test_recordings_keep_status_promise_and_party() -> None:
    recording = recorded(served(0, 1, party=1), refused(1, 7))
    assert recording.status.tolist() == [200, 429]
    assert np.isnan(recording.retry_after_s[0]) and recording.retry_after_s[1] == 7
    assert recording.party.tolist() == [1, 0]

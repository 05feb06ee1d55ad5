"""Metrics: declared once, named alike, cheap per chunk, mergeable."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from serving.telemetry.metrics import (
    ITL_S,
    TTFT_S,
    GatewayMetrics,
    merge,
    quantile,
    set_all,
    slo_verdict,
    unrested_gauges,
)

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]

# A gauge that counts things is named after the things.
COUNTED = ("steelyard_requests_held", "steelyard_requests_waiting", "steelyard_requests_running", "steelyard_replicas")
UNITS = ("_seconds", "_bytes", "_total", "_fds", "_info", "_ratio", "_required", *COUNTED)


@pytest.fixture
def metrics() -> GatewayMetrics:
    return GatewayMetrics(CollectorRegistry())


def series(text: str) -> Series:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(text: str, name: str, **labels: str) -> float:
    return series(text)[(name, frozenset(labels.items()))]


def used(metrics: GatewayMetrics) -> GatewayMetrics:
    """Every metric touched once."""
    model = metrics.of("tiny", "v1", "pirate")
    for gauge in (model.held, model.waiting("batch"), model.running):
        gauge.inc()
    model.used(3, 3, 3)
    model.aborted(2)
    model.retried("died")
    model.judged("good")
    model.queue_wait("batch").observe(0.01)
    model.request_done("/v1/chat/completions", 200, "ok", 1.5)
    model.rejected("queue_full", "batch")
    model.attempted("busy")
    meter = model.stream(10.0)
    for now in (10.05, 10.06, 10.09):
        meter.chunk(now)
    meter.flush()
    set_all(metrics.replicas, {("tiny", "v1", "READY"): 2})
    set_all(metrics.replicas_required, {("tiny", "v1"): 1})
    set_all(metrics.objective, {("tiny",): 0.99})
    set_all(metrics.key_expiry, {("0a0b0c0d",): 2e9})
    return metrics


def test_every_name_says_steelyard_and_a_unit(metrics: GatewayMetrics) -> None:
    names = [line.split()[2] for line in used(metrics).text().splitlines() if line.startswith("# TYPE")]
    assert len(names) >= 15
    assert [name for name in names if not name.startswith("steelyard_")] == []
    assert [name for name in names if not name.endswith(UNITS)] == []
    assert len(set(names)) == len(names)


def test_every_metric_is_counted(metrics: GatewayMetrics) -> None:
    text = used(metrics).text()
    tiny = {"model": "tiny", "version": "v1"}
    route = "/v1/chat/completions"
    ended = tiny | {"adapter": "pirate", "route": route, "status": "200", "reason": "ok"}
    assert value(text, "steelyard_requests_total", **ended) == 1
    batch = tiny | {"class": "batch"}
    assert value(text, "steelyard_rejections_total", **batch, reason="queue_full") == 1
    assert value(text, "steelyard_upstream_attempts_total", **tiny, outcome="busy") == 1
    assert value(text, "steelyard_retries_total", **tiny, outcome="died") == 1
    assert value(text, "steelyard_slo_requests_total", **tiny, verdict="good") == 1
    tokens = tiny | {"adapter": "pirate"}
    for kind in ("prompt", "completion", "cached"):
        assert value(text, "steelyard_tokens_total", **tokens, kind=kind, outcome="completed") == 3
    assert value(text, "steelyard_tokens_total", **tokens, kind="completion", outcome="aborted") == 2
    assert value(text, "steelyard_stream_events_total", **tiny) == 3
    assert value(text, "steelyard_replicas", **tiny, state="READY") == 2
    assert value(text, "steelyard_key_expiry_timestamp_seconds", key="0a0b0c0d") == 2e9
    for name in ("ttft", "e2e"):
        assert value(text, f"steelyard_{name}_seconds_count", **tiny) == 1
    assert value(text, "steelyard_queue_wait_seconds_count", **batch) == 1
    assert "_created" not in text


def test_the_meter_agrees_with_the_librarys_histogram(metrics: GatewayMetrics) -> None:
    registry = CollectorRegistry()
    plain = Histogram("steelyard_itl_seconds", "x", ["model", "version"], buckets=ITL_S, registry=registry)
    now, meter = 5.0, metrics.of("tiny", "v1").stream(4.0)
    meter.chunk(now)
    for gap in (0.0, 0.001, 0.0011, 0.02, 0.0200001, 1.0, 2.5, 2.6, 60.0):
        meter.chunk(now + gap)
        plain.labels("tiny", "v1").observe(now + gap - now)
        now += gap
    assert (meter.ttft_s, meter.chunks) == (1.0, 10)
    meter.flush()
    meter.flush()
    ours = {key: at for key, at in series(metrics.text()).items() if key[0].startswith("steelyard_itl")}
    assert ours == pytest.approx(
        {k: v for k, v in series(generate_latest(registry).decode()).items() if "_created" not in k[0]}
    )


def test_a_stream_without_a_chunk_counts_nothing(metrics: GatewayMetrics) -> None:
    meter = metrics.of("tiny", "v1").stream(1.0)
    meter.flush()
    assert meter.ttft_s is None
    assert value(metrics.text(), "steelyard_ttft_seconds_count", model="tiny", version="v1") == 0


def test_buckets_reach_from_a_millisecond_to_the_longest_wait() -> None:
    assert (TTFT_S[0], TTFT_S[-1], ITL_S[0], ITL_S[-1]) == (0.001, 600, 0.001, 10)
    assert list(TTFT_S) == sorted(set(TTFT_S))
    assert list(ITL_S) == sorted(set(ITL_S))


def test_a_model_has_one_set_of_children(metrics: GatewayMetrics) -> None:
    assert metrics.of("tiny", "v1") is metrics.of("tiny", "v1")
    assert metrics.of("tiny", "v1", "pirate") is not metrics.of("tiny", "v1")


def test_gauges_rest_when_every_request_has_ended(metrics: GatewayMetrics) -> None:
    text = used(metrics).text()
    assert unrested_gauges(text) == {
        "steelyard_requests_held{tiny}": 1,
        "steelyard_requests_waiting{tiny}": 1,
        "steelyard_requests_running{tiny}": 1,
    }
    model = metrics.of("tiny", "v1")
    for gauge in (model.held, model.waiting("batch"), model.running):
        gauge.dec()
    assert unrested_gauges(metrics.text()) == {}


def test_replicas_that_left_the_table_leave_the_metrics(metrics: GatewayMetrics) -> None:
    set_all(metrics.replicas, {("a", "v1", "READY"): 1, ("a", "v1", "STARTING"): 1})
    set_all(metrics.replicas, {("a", "v1", "READY"): 2})
    assert {k: v for k, v in series(metrics.text()).items() if k[0] == "steelyard_replicas"} == {
        ("steelyard_replicas", frozenset({("model", "a"), ("version", "v1"), ("state", "READY")})): 2
    }


@pytest.mark.parametrize(
    ("status", "reason", "ttft_s", "verdict"),
    [
        (200, "ok", 0.9, "good"),
        (200, "ok", None, "good"),
        (200, "ok", 1.1, "slow"),
        (200, "engine_error", 0.9, "failed"),
        (502, "engine_error", None, "failed"),
        (429, "queue_full", None, "failed"),
        (504, "deadline_exceeded", None, "failed"),
        (429, "limit_reached", None, None),
        (400, "invalid_request", None, None),
        (400, "engine_refused", None, None),
        (499, "client_gone", None, None),
        (200, "client_gone", 0.9, None),
    ],
)
def test_good_is_the_right_status_a_first_token_in_time_and_no_error_in_the_stream(
    status: int, reason: str, ttft_s: float | None, verdict: str | None
) -> None:
    assert slo_verdict(status, reason, ttft_s, 1.0) == verdict


VLLM = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="tiny"} 3.0
# HELP vllm:prompt_tokens_total Number of prefill tokens processed.
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="tiny"} 12.0
# HELP vllm:prompt_tokens_created Number of prefill tokens processed.
# TYPE vllm:prompt_tokens_created gauge
vllm:prompt_tokens_created{engine="0",model_name="tiny"} 1.7e+09
"""


def test_engines_keep_their_names_and_families_are_grouped() -> None:
    merged = merge([({"replica": "a"}, VLLM), ({"replica": "b"}, VLLM.replace("3.0", "4.0"))])
    assert (
        merged
        == """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{replica="a",engine="0",model_name="tiny"} 3.0
vllm:num_requests_running{replica="b",engine="0",model_name="tiny"} 4.0
# HELP vllm:prompt_tokens_total Number of prefill tokens processed.
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{replica="a",engine="0",model_name="tiny"} 12.0
vllm:prompt_tokens_total{replica="b",engine="0",model_name="tiny"} 12.0
"""
    )


def test_a_label_that_is_there_already_is_kept_as_exported() -> None:
    merged = merge([({"engine": "r1"}, 'x{engine="0",a="engine=\\"9\\""} 1\ny{reengine="0"} 2\n')])
    assert merged == 'x{engine="r1",exported_engine="0",a="engine=\\"9\\""} 1\ny{engine="r1",reengine="0"} 2\n'


def test_a_torn_answer_costs_only_its_last_line() -> None:
    for cut in range(len(VLLM)):
        text = merge([({"replica": "a"}, VLLM[:cut]), ({"replica": "b"}, VLLM)])
        ours = {at for (name, labels), at in series(text).items() if ("replica", "a") in labels}
        assert ours <= {3.0, 12.0}
        assert 'replica="b",engine="0",model_name="tiny"} 3.0' in text


def test_special_values_and_timestamps_pass() -> None:
    text = 'a 1\nb{} NaN\nc +Inf 1700000000000\nd{x="1",} -Inf\n\n# a comment\n  \nnonsense here now 1\n'
    assert merge([({}, text)]) == 'a 1\nb NaN\nc +Inf 1700000000000\nd{x="1"} -Inf\n'
    assert merge([]) == ""


def test_the_merged_view_of_gateways_parses_to_the_same_numbers(metrics: GatewayMetrics) -> None:
    text = used(metrics).text()
    merged = series(merge([({"gateway": "a"}, text), ({"gateway": "b"}, text)]))
    for name in ("a", "b"):
        assert {
            (k, labels - {("gateway", name)}): v for (k, labels), v in merged.items() if ("gateway", name) in labels
        } == series(text)


@given(
    st.lists(
        st.tuples(
            st.sampled_from([Counter, Gauge, Histogram]),
            st.from_regex(r"[a-z]{1,6}", fullmatch=True),
            st.text(max_size=8),
            st.floats(0, 1e9),
        ),
        max_size=6,
        unique_by=lambda made: made[1],
    ),
    st.dictionaries(st.sampled_from(["replica", "v", "node"]), st.text(max_size=8), min_size=1),
)
def test_merge_round_trips_through_the_parser(
    made: list[tuple[type[Counter | Gauge | Histogram], str, str, float]], added: dict[str, str]
) -> None:
    registry = CollectorRegistry()
    for kind, name, label, number in made:
        child = kind(f"m_{kind.__name__.lower()}_{name}", "help \\ \n text", ["v"], registry=registry).labels(label)
        child.observe(number) if isinstance(child, Histogram) else child.inc(number)
    text = generate_latest(registry).decode()
    wanted = {}
    for (name, labels), number in series(text).items():
        if not name.endswith("_created"):
            moved = {(f"exported_{key}" if key in added else key, v) for key, v in labels}
            wanted[(name, frozenset(moved | set(added.items())))] = number
    got = series(merge([(added, text)]))
    assert got.keys() == wanted.keys()
    assert all(math.isclose(got[key], wanted[key]) for key in wanted)


def test_the_median_gap_is_of_the_buckets_and_the_longest_is_exact(metrics: GatewayMetrics) -> None:
    meter = metrics.of("tiny", "v1").stream(0.0)
    meter.chunk(1.0)
    assert meter.itl_s is None
    for now in (1.005, 1.010, 1.015, 4.0):
        meter.chunk(now)
    assert meter.itl_s is not None
    median, longest = meter.itl_s
    assert 0.004 <= median <= 0.006 and longest == pytest.approx(2.985)


def test_a_quantile_is_read_as_prometheus_reads_it() -> None:
    assert quantile(0.5, [1.0, 2.0, math.inf], [2, 4, 4]) == 1.0
    assert quantile(0.75, [1.0, 2.0, math.inf], [2, 4, 4]) == 1.5
    assert quantile(0.99, [1.0, 2.0, math.inf], [0, 0, 3]) == 2.0
    assert math.isnan(quantile(0.5, [1.0, math.inf], [0, 0]))

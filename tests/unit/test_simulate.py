"""The fleet simulator against answers found by hand, trace files and what is wrong with them, and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from serving.cli.scale import scale_app as app
from serving.errors import OperatorError
from serving.fleet import compare, rivals, simulate, trace
from serving.fleet.scaling import Limits, Load
from serving.fleet.simulate import Fleet, Goal, Service, Work
from serving.fleet.trace import Trace

TRACES = Path(__file__).resolve().parents[2].parent / "shared" / "traces"


def made(requests: list[tuple[float, float]], span_s: float, times: int = 1) -> Trace:
    """(arrival, seconds of service) of each request."""
    arrival = np.array([r[0] for r in requests], dtype=float)
    zero = np.zeros(len(requests))
    service = np.array([r[1] for r in requests], dtype=float)
    return Trace("made", arrival, zero, zero, service, np.full(len(requests), times, np.int64), span_s)


def work(found: Trace, service: Service, wait_s: float = 0.0, step_s: float = 1.0) -> Work:
    return simulate.prepare(found, service, Goal(wait_s=wait_s), step_s)


class Course:
    """Asks for given counts at given seconds."""

    name = "course"

    def __init__(self, **at: int) -> None:
        self.at = {int(second[1:]): n for second, n in at.items()}

    def __call__(self, load: Load, fleet: Fleet, now: float) -> int:
        return self.at.get(int(now), load.replicas)


SQUARE = made(
    [(t, 1.0) for t in [*range(100), *range(400, 500), *[t for t in range(400, 500) for _ in range(3)]]], 900.0
)


def square(start_s: float) -> float:
    """One request a second for 100 s, none for 300, four for 100, none for 400; each lasts a second; one slot."""
    order = np.argsort(SQUARE.arrival_s, kind="stable")
    found = SQUARE._replace(arrival_s=SQUARE.arrival_s[order])
    service = Service(slots=1, start_s=start_s)
    return simulate.clairvoyant(work(found, service), service, 0) * 3600


def test_to_zero_between_two_requests_and_back() -> None:
    service = Service(slots=4, start_s=10)
    ready = work(made([(0, 5.0), (300, 5.0)], 400.0), service, wait_s=15)
    ours = simulate.Steelyard(Limits(min=0, max=4, target_ongoing=3, scale_down_after_s=600, idle_to_zero_s=60))
    result = simulate.run(ready, service, ours, replicas=1)
    assert result.replicas[[0, 60, 70, 299, 302, 320, 399]].tolist() == [1, 1, 0, 0, 1, 1, 0]
    assert (result.rejected, result.wait_p99_s, result.attainment) == (0, 10, 1.0)


def test_the_clairvoyant_bound_of_a_square_wave() -> None:
    assert square(10) == 100 + 4 * 100 + 4 * 10, "every replica of the second wave is started anew"
    # The first one is kept through the gap of 300 s, the other three are started.
    assert square(1000) == 100 + 300 + 4 * 100 + 3 * 1000


def test_the_bound_lets_requests_wait_within_the_goal() -> None:
    service = Service(slots=1, start_s=1)
    together = made([(0, 10.0), (0, 10.0)], 20.0)
    assert simulate.clairvoyant(work(together, service), service, 0) * 3600 == 20 + 0
    late = work(together, service, wait_s=10)
    assert simulate.clairvoyant(late, service, 0) * 3600 == 20, "one after the other, by one replica"
    assert simulate.clairvoyant(late, service, 2) * 3600 == 40, "two are the fewest allowed"


def test_no_policy_beats_the_bound() -> None:
    found = trace.synthetic("bursty", rate=20, hours=1, seed=3)
    service = Service(slots=16, start_s=30)
    ready = work(found, service, wait_s=2)
    bound = simulate.clairvoyant(ready, service, 1)
    result = simulate.run(
        ready, service, rivals.Static(simulate.peak(ready, service)), replicas=simulate.peak(ready, service)
    )
    assert result.attainment == 1.0 and result.rejected == 0
    assert result.gpu_hours >= bound


def test_requests_queue_in_order_and_waits_are_counted() -> None:
    """One slot, three requests of 4 s at once: they wait 0, 4 and 8 s."""
    service = Service(slots=1, start_s=10)
    ready = work(made([(0, 4.0)] * 3, 20.0), service, wait_s=4)
    result = simulate.run(ready, service, Course(), replicas=1)
    assert result.attainment == pytest.approx(2 / 3)
    assert (result.wait_p99_s, result.rejected, result.requests) == (8, 0, 3)
    assert result.gpu_hours * 3600 == 20
    assert result.held[:10].tolist() == [2, 2, 2, 2, 1, 1, 1, 1, 0, 0]


def test_a_row_of_many_like_requests_is_served_in_parts() -> None:
    service = Service(slots=4, start_s=10)
    single = simulate.run(work(made([(0, 5.0)] * 10, 30.0), service), service, Course(), replicas=1)
    row = simulate.run(work(made([(0, 5.0)], 30.0, times=10), service), service, Course(), replicas=1)
    assert single.held.tolist() == row.held.tolist()
    assert single.attainment == row.attainment == 0.4
    assert row.wait_p99_s == 10


def test_the_queue_is_bounded_in_length_and_time() -> None:
    short = Service(slots=1, start_s=10, max_queue=1)
    full = simulate.run(work(made([(0, 4.0)] * 3, 20.0), short), short, Course(), replicas=1)
    assert (full.rejected, full.wait_p99_s) == (1, 4)
    hasty = Service(slots=1, start_s=10, max_wait_s=5)
    late = simulate.run(work(made([(0, 4.0)] * 3, 20.0), hasty), hasty, Course(), replicas=1)
    assert (late.rejected, late.wait_p99_s) == (1, 4)


def test_a_start_takes_its_time_and_costs_from_the_first_second() -> None:
    service = Service(slots=1, start_s=10)
    ready = work(made([(0, 30.0), (5, 5.0)], 40.0), service, wait_s=9)
    result = simulate.run(ready, service, Course(s5=2), replicas=1)
    assert result.replicas[:8].tolist() == [1, 1, 1, 1, 1, 1, 2, 2]
    assert result.wait_p99_s == 10, "asked for at 5, ready at 15"
    assert result.attainment == 0.5


def test_replicas_that_start_are_called_off_before_ready_ones_drain() -> None:
    service = Service(slots=1, start_s=10)
    ready = work(made([(0, 30.0), (0, 30.0)], 40.0), service)
    result = simulate.run(ready, service, Course(s3=4, s6=2), replicas=2)
    assert result.replicas[[3, 4, 6, 7, 20]].tolist() == [2, 4, 4, 2, 2]


def test_a_replica_that_drains_holds_its_gpu_until_its_last_stream_ended() -> None:
    service = Service(slots=4, start_s=10)
    ready = work(made([(0, 20.0)] * 8 + [(10, 1.0)], 40.0), service)
    result = simulate.run(ready, service, Course(s5=1), replicas=2)
    assert result.replicas[[5, 19, 21, 30]].tolist() == [2, 2, 1, 1]
    assert result.wait_p99_s == 10, "the slots of the one that drains take nothing new"


def test_every_request_is_served_or_rejected_once() -> None:
    found = trace.synthetic("spike", rate=60, hours=2, seed=5)
    service = Service(slots=16, start_s=120, max_queue=50)
    limits = Limits(min=1, max=40, target_ongoing=14)
    for policy in (simulate.Steelyard(limits), rivals.Hpa(limits)):
        ready = work(found, service, wait_s=2)
        fleet = Fleet(ready, service, 2)
        while fleet.step < ready.steps + 1000:
            load = fleet.advance()
            fleet.steer(policy(load, fleet, fleet.step * ready.step_s))
            assert 0 <= load.running <= fleet.service.slots * load.ready + 0
            assert load.held <= service.max_queue
            fleet.step += 1
        assert int(fleet.waits.sum()) + fleet.refused == found.requests
        assert fleet.running == 0 and fleet.held == 0
        assert int(fleet.ends.sum() + fleet.drain_ends.sum()) == int(fleet.waits.sum())


def test_the_hpa_tolerates_a_tenth_and_goes_down_after_300_s() -> None:
    limits = Limits(min=1, max=100, target_ongoing=10)
    hpa = rivals.Hpa(limits)
    fleet = Fleet(work(made([(0, 1.0)], 10.0), Service()), Service(), 1)

    def ask(replicas: int, running: int, now: float) -> int:
        return hpa(Load(replicas=replicas, ready=replicas, running=running), fleet, now)

    assert ask(10, 109, 0) == 10
    assert ask(10, 150, 15) == 15
    assert ask(2, 500, 30) == 6, "four pods, or twice as many"
    assert [ask(10, 20, 45 + 15 * i) for i in (0, 10, 30)] == [10, 10, 2]


def test_ray_serves_own_policy_waits_its_documented_delays() -> None:
    pytest.importorskip("ray.serve")
    limits = Limits(min=1, max=100, target_ongoing=10)
    ray = rivals.RayServe(limits)
    service = Service(slots=1000)
    ready = work(made([(t / 10, 200.0) for t in range(500)], 900.0), service)
    result = simulate.run(ready, service, ray, replicas=1)
    first_up = int(np.argmax(result.replicas > 1))
    assert 30 <= first_up <= 60
    down = int(np.flatnonzero(np.diff(result.replicas) < 0)[0])
    assert down >= 200 + 600


def test_our_policy_answers_a_step_within_two_seconds() -> None:
    service = Service(slots=16, start_s=30)
    # Sixteen a second lasting 10 s need ten replicas; one a second before that.
    found = made([(t, 10.0) for t in range(300)] + [(300 + t / 16, 10.0) for t in range(16 * 300)], 600.0)
    ready = work(found, service, wait_s=2, step_s=0.5)
    result = simulate.run(ready, service, simulate.Steelyard(Limits(min=1, max=50, target_ongoing=14)), replicas=1)
    breach = int(np.flatnonzero(result.held > 0)[0])
    up = int(np.flatnonzero(np.diff(result.replicas) > 0)[0])
    assert up - breach <= 4
    assert result.replicas.max() <= 30, "no runaway while they start: twelve, and what clears the backlog"


def test_a_comparison_names_every_policy_and_its_bars(tmp_path: Path) -> None:
    found = compare.compare(
        trace.synthetic("diurnal", rate=20, hours=0.5, seed=1),
        Service(slots=16),
        Limits(min=1, max=0, target_ongoing=14),
        Goal(wait_s=None, ttft_s=3.0),
        step_s=1.0,
    )
    told = compare.as_json(found)
    assert told["policies"][0]["name"] == "steelyard"
    assert {"hpa", "static peak"} <= {p["name"] for p in told["policies"]}
    assert all(p["gpu_hours"] >= told["clairvoyant_gpu_hours"] for p in told["policies"] if p["attainment"] == 1)
    assert [b["name"] for b in told["bars"]] == ["gpu_hours_ratio", "attainment"]
    assert told["limits"]["max"] > 0


def test_ray_is_left_out_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(limits: Limits) -> None:
        raise ImportError("ray")

    monkeypatch.setattr(rivals, "RayServe", missing)
    found = compare.compare(
        made([(t, 5.0) for t in range(60)], 60.0), Service(), Limits(min=1, max=3, target_ongoing=8), Goal(), step_s=1.0
    )
    assert [r.name for r in found.results] == ["steelyard", "hpa", "static peak"]
    assert found.notes == ("ray is not installed: its policy is left out",)


def test_the_frontier_says_what_hours_buy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "DOWN_S", (30.0, 600.0))
    waves = made([(t, 20.0) for t in range(900) if t % 300 < 100 for _ in range(4)], 900.0)
    limits = Limits(min=1, max=0, target_ongoing=14)
    found = compare.compare(waves, Service(slots=16), limits, Goal(), step_s=1.0, frontier=True)
    told = [(p["policy"], p["down_after_s"]) for p in compare.as_json(found)["frontier"]]
    names = [r.name for r in found.results if r.name != "static peak"]
    assert told == [(name, down_s) for down_s in (30.0, 600.0) for name in names]
    hasty, patient = found.frontier
    for less, more in zip(hasty[1], patient[1], strict=True):
        assert less.gpu_hours < more.gpu_hours and less.attainment <= more.attainment


@pytest.mark.parametrize("kind", ["diurnal", "spike", "bursty"])
def test_synthetic_traffic_is_the_same_for_the_same_seed(kind: str) -> None:
    one, same, other = (trace.synthetic(kind, rate=50, hours=2, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(one.prompt, same.prompt) and one.requests != other.requests
    assert (np.diff(one.arrival_s) >= 0).all() and (one.times > 0).all()
    assert one.arrival_s[-1] < one.span_s == 7200
    assert one.requests == pytest.approx(50 * 7200 * {"diurnal": 0.6, "spike": 0.39, "bursty": 0.6}[kind], rel=0.35)


AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
)
MOONCAKE = '{"timestamp": 3000, "input_length": 10, "output_length": 2, "hash_ids": [0]}\n'
MOONCAKE += '{"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}\n'


def written(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_the_columns_of_the_published_traces_are_known(tmp_path: Path) -> None:
    azure = trace.read(written(tmp_path, "azure.csv", AZURE))
    assert azure.arrival_s.tolist() == pytest.approx([0, 4.314579])
    assert (azure.prompt.tolist(), azure.output.tolist()) == ([374, 396], [44, 109])
    mooncake = trace.read(written(tmp_path, "mooncake.jsonl", MOONCAKE))
    assert mooncake.arrival_s.tolist() == [0, 3], "milliseconds, sorted"
    assert mooncake.output.tolist() == [500, 2]


def test_a_trace_may_bring_its_own_service_times(tmp_path: Path) -> None:
    found = trace.read(written(tmp_path, "own.csv", "arrival_s,service_s\n10.5,2.25\n11,3\n"))
    assert found.arrival_s.tolist() == [0, 0.5]
    assert work(found, Service(), step_s=0.25).service.tolist() == [9, 12]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("t.csv", "", "t.csv:1: no time of arrival"),
        ("t.csv", "arrival_s,output_tokens\n", "t.csv: has no requests"),
        ("t.csv", "when,output_tokens\n1,2\n", "t.csv:1: no time of arrival"),
        ("t.csv", "arrival_s,prompt_tokens\n1,2\n", "t.csv:1: no size of the answer"),
        ("t.csv", "arrival_s,output_tokens\n1,2\nsoon,3\n", "t.csv:3: arrival_s = 'soon' is no time"),
        ("t.csv", "arrival_s,output_tokens\n1,2\n2\n", "t.csv:3: output_tokens is missing"),
        ("t.csv", "arrival_s,output_tokens\n1,-2\n", "t.csv:2: output_tokens = '-2' is no number of at least 0"),
        ("t.csv", "arrival_s,output_tokens\nnan,2\n", "t.csv:2: arrival_s = 'nan' is no time"),
        ("t.csv", "arrival_s,output_tokens\n1,inf\n", "t.csv:2: output_tokens = 'inf'"),
        ("t.jsonl", '{"timestamp": 0, "output_length": 1}\n{"timestamp"\n', "t.jsonl:2: is not a JSON object"),
        ("t.jsonl", "[1, 2]\n", "t.jsonl:1: is not a JSON object"),
        ("t.jsonl", '{"timestamp": 0, "output_length": true}\n', "t.jsonl:1: output_length = True is no number"),
        ("t.jsonl", '{"output_length": 1}\n', "t.jsonl:1: no time of arrival"),
        ("t.parquet", "x", "t.parquet: a trace is a .csv or a .jsonl file"),
    ],
)
def test_a_bad_trace_is_refused_by_file_and_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(OperatorError) as refused:
        trace.read(written(tmp_path, name, text))
    assert message in str(refused.value)


def test_times_of_two_units_are_refused_before_they_fill_the_memory(tmp_path: Path) -> None:
    found = trace.read(written(tmp_path, "mixed.csv", "arrival_s,output_tokens\n5,10\n1763800000000,10\n"))
    with pytest.raises(OperatorError, match=r"mixed\.csv: .* hours.*Check the unit of its times"):
        work(found, Service())


def test_a_trace_that_is_not_there_or_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match="cannot be read: No such file"):
        trace.read(tmp_path / "none.csv")
    (tmp_path / "bytes.csv").write_bytes(b"arrival_s,output_tokens\n\xff\xfe,1\n")
    with pytest.raises(OperatorError, match="is not UTF-8"):
        trace.read(tmp_path / "bytes.csv")


@pytest.mark.skipif(not TRACES.is_dir(), reason="the published traces are not beside the repository (../shared/traces)")
@pytest.mark.parametrize(
    "name, requests", [("AzureLLMInferenceTrace_conv.csv", 19_366), ("mooncake_conversation_trace.jsonl", 12_031)]
)
def test_a_published_trace_is_read_whole(name: str, requests: int) -> None:
    found = trace.read(TRACES / name)
    assert found.requests == requests
    assert found.span_s == pytest.approx(3600, abs=120)


@pytest.mark.slow
def test_the_command_prints_a_table_json_and_a_plot(tmp_path: Path) -> None:
    path = written(
        tmp_path, "own.csv", "arrival_s,prompt_tokens,output_tokens\n" + "".join(f"{t},100,200\n" for t in range(100))
    )
    picture = tmp_path / "course.png"
    table = CliRunner().invoke(app, ["simulate", str(path), "--slots", "4", "--start", "20"])
    assert table.exit_code == 0, table.output
    assert all(name in table.output for name in ("steelyard", "hpa", "static peak", "clairvoyant", "100 requests"))
    pytest.importorskip("matplotlib")
    told = CliRunner().invoke(app, ["simulate", str(path), "--slots", "4", "--json", "--plot", str(picture)])
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)["trace"]["requests"] == 100
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give a trace file or --synthetic"),
        (["t.csv", "--synthetic", "spike"], "give a trace file or --synthetic"),
        (["--synthetic", "square"], "--synthetic square is not known"),
        (["t.csv"], "t.csv: cannot be read"),
        (["--synthetic", "spike", "--rate", "0.01", "--hours", "0.05"], "makes no request"),
        (["--synthetic", "spike", "--goal-wait", "1", "--goal-ttft", "1"], "two goals"),
        (["--synthetic", "spike", "--min", "3", "--max", "2"], "--max 2 is below --min 3"),
        (["--synthetic", "spike", "--idle-to-zero", "60"], "--idle-to-zero needs --min 0"),
    ],
)
def test_the_command_refuses_in_one_line(arguments: list[str], message: str) -> None:
    refused = CliRunner().invoke(app, ["simulate", *arguments])
    assert refused.exit_code == 1
    assert message in refused.stderr and refused.stderr.count("\n") == 1


def test_steps_do_not_lose_service_time() -> None:
    ready = work(made([(0, 0.1 * 3)], 5.0), Service(), step_s=0.1)
    assert ready.service.tolist() == [3]
    assert math.isclose(ready.step_s * ready.steps, 5.0)

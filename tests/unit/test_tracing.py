"""What decides whether and how a request is traced: settings, W3C's header, the engine's command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from serving.engine import command
from serving.engine.command import EngineSpec, Traces
from serving.errors import OperatorError
from serving.settings import Settings, load_settings, worker_environment
from serving.telemetry import tracing
from serving.telemetry.logs import RequestLine
from serving.telemetry.tracing import MOST_STEPS, Trace, Tracing

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Kept:
    """A sink that keeps what it is offered."""

    def __init__(self) -> None:
        self.traces: list[Trace] = []

    def offer(self, trace: Trace, line: RequestLine, method: str, began: float, ended: float) -> None:
        self.traces.append(trace)

    def close(self) -> None:
        pass


def begun(header: str | None, state: str = "", *, trusted: bool = False, ratio: float = 1.0) -> Trace | None:
    headers = {} if header is None else {b"traceparent": header.encode()}
    return Tracing(ratio, Kept()).begin(headers | {b"tracestate": state.encode()}, trusted=trusted)


@pytest.mark.parametrize(
    ("header", "joined"),
    [
        (f"00-{TRACE}-{PARENT}-01", True),
        (f"00-{TRACE}-{PARENT}-00", True),
        (f"cc-{TRACE}-{PARENT}-01-what.the.future.brings", True),
        (f"00-{TRACE}-{PARENT}-01-more", False),
        (f"ff-{TRACE}-{PARENT}-01", False),
        (f"00-{'0' * 32}-{PARENT}-01", False),
        (f"00-{TRACE}-{'0' * 16}-01", False),
        (f"00-{TRACE.upper()}-{PARENT}-01", False),
        (f"00-{TRACE}-{PARENT}", False),
        (f"00-{TRACE}-{PARENT}-01\r\nx: y", False),
        ("", False),
        (None, False),
    ],
)
@pytest.mark.parametrize("trusted", [False, True])
def test_w3cs_header_is_joined_and_anything_else_begins_a_trace(
    header: str | None, joined: bool, trusted: bool
) -> None:
    found = begun(header, trusted=trusted)
    if trusted and joined and header is not None and header.endswith("-00"):
        assert found is None
        return
    assert found is not None and found.root
    assert ((found.id, f"{found.parent:016x}") == (TRACE, PARENT)) is joined
    assert joined or found.parent == 0


@pytest.mark.parametrize(
    ("state", "kept"), [("a=1,b=2", True), ("a=1\r\nx: y", False), ("x" * 513, False), ("", False)]
)
def test_tracestate_goes_on_where_it_is_one(state: str, kept: bool) -> None:
    found = begun(f"00-{TRACE}-{PARENT}-01", state)
    assert found is not None and found.state == (state.encode() if kept else b"")
    assert begun(None, state).state == b""  # type: ignore[union-attr]


def test_the_ratio_is_of_requests() -> None:
    draws = [0.0, 0.099, 0.1, 0.9]
    with mock.patch.object(tracing.random, "random", side_effect=draws):
        assert [begun(None, ratio=0.1) is not None for _ in draws] == [True, True, False, False]


@pytest.mark.parametrize("outcome", ["busy", "recalled"])
@pytest.mark.parametrize("steps", [["queue"], ["retry wait", "queue"], ["queue", "retry wait", "queue"]])
def test_a_request_that_is_told_busy_for_long_stays_small(outcome: str, steps: list[str]) -> None:
    trace = Trace(1, 0, b"")
    for i in range(1000):
        for step in steps:
            trace.step(step, i, i)
        trace.sent("r", "n", i, i)
        trace.attempted(outcome, i)
    trace.step("queue", 1000, 1000)
    trace.sent("well", "n", 1000, 1000)
    trace.answered(1001, streamed=True)
    trace.attempted("ok", 1002)
    assert len(trace.steps) <= MOST_STEPS + 5
    assert trace.left_out + sum(s.about.get("steelyard.outcome") == outcome for s in trace.steps) == 1000
    assert [s.name for s in trace.steps[-5:]] == ["queue", "pick", "attempt", "first byte", "stream"]
    assert trace.steps[-3].about["steelyard.replica"] == "well"
    assert not any(s.failed for s in trace.steps)


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ("http://collector:4318", "http://collector:4318/v1/traces"),
        ("https://collector/", "https://collector/v1/traces"),
        ("http://collector:4318/otlp/v1/traces", "http://collector:4318/otlp/v1/traces"),
        ("http://[::1]:4318", "http://[::1]:4318/v1/traces"),
    ],
)
def test_the_endpoint_is_a_base_url_as_opentelemetrys_own(given: str, where: str) -> None:
    assert load_settings(otlp_endpoint=given).otlp_endpoint == where


@pytest.mark.parametrize(
    "bad", ["collector:4318", "grpc://c:4317", "http://u:p@c", "http://c?x=1", "http://c:99999", "/v1"]
)
def test_an_endpoint_that_is_none_is_named(bad: str) -> None:
    with pytest.raises(OperatorError, match="STEELYARD_OTLP_ENDPOINT") as e:
        load_settings(otlp_endpoint=bad)
    assert "u:p" not in str(e.value)


@pytest.mark.parametrize("password", ["p", "p@ss", "pa/ss", "p@/s@s", "pa ss", "pa'ss", "pa\nss"])
def test_an_endpoint_with_a_password_is_told_without_any_of_it(password: str) -> None:
    with pytest.raises(OperatorError) as e:
        load_settings(otlp_endpoint=f"http://u:{password}@collector")
    assert "http://***@collector" in str(e.value)


def test_workers_hear_of_it_and_of_no_secret(tmp_path: Path) -> None:
    file = private(tmp_path / "headers", "authorization: Bearer secret\n")
    settings = load_settings(otlp_endpoint="http://c", otlp_headers_file=file, trace_ratio=0.5, trace_service="prod")
    told = worker_environment(settings)
    assert "secret" not in str(told)
    with mock.patch.dict("os.environ", told):
        again = load_settings()
    assert (again.otlp_endpoint, again.trace_ratio, again.trace_service) == ("http://c/v1/traces", 0.5, "prod")
    assert again.otlp_headers() == {"authorization": "Bearer secret"}


@pytest.mark.parametrize("line", ["authorization", "a b: c", ": x", "name:", "name: \x07"])
def test_a_line_that_is_no_header_is_named_by_its_number_alone(tmp_path: Path, line: str) -> None:
    settings = Settings(otlp_headers_file=private(tmp_path / "headers", f"x: s3cret\n{line}\n"))
    with pytest.raises(OperatorError, match="line 2 is no header") as e:
        settings.otlp_headers()
    assert line not in str(e.value).split("line 2")[0] and "s3cret" not in str(e.value)


def test_headers_that_others_can_read_are_refused(tmp_path: Path) -> None:
    file = private(tmp_path / "headers", "a: b")
    file.chmod(0o644)
    with pytest.raises(OperatorError, match="can be read by others"):
        Settings(otlp_headers_file=file).otlp_headers()


def private(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


def engine(kind: str, traces: Traces | None, **args: object) -> command.Command:
    spec = EngineSpec(model="m", version="v", kind=kind, weights="/w", served_names=["m"], args=args)
    environ = {"OTEL_RESOURCE_ATTRIBUTES": "deployment.environment=prod"}
    return command.build(
        spec, host="h", port=1, secret="s", mark="m", parent_pid=1, environ=environ, traces=traces
    )  # fmt: skip


def test_vllm_sends_its_spans_there_and_only_under_a_gateways() -> None:
    traces = Traces("http://c/v1/traces", {"authorization": "Bearer a,b=c"}, "prod", {"service.instance.id": "m@v#1"})
    made = engine("vllm", traces)
    assert made.argv[made.argv.index("--otlp-traces-endpoint") + 1] == "http://c/v1/traces"
    assert "Bearer" not in " ".join(made.argv)
    told = {name: value for name, value in made.env.items() if name.startswith(("OTEL_", "TRACE"))}
    assert told == {
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        "OTEL_EXPORTER_OTLP_TRACES_HEADERS": "authorization=Bearer%20a%2Cb%3Dc",
        "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT": "3",
        "OTEL_TRACES_SAMPLER": "parentbased_always_off",
        "TRACEPARENT": "none",
        "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "64",
        "OTEL_SERVICE_NAME": "prod-engine",
        "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment=prod,service.instance.id=m%40v%231",
    }


def test_without_a_collector_and_with_a_spec_of_its_own_an_engine_is_left_alone() -> None:
    traces = Traces("http://c/v1/traces", {}, "steelyard")
    own = engine("vllm", traces, **{"otlp-traces-endpoint": "http://mine"})
    assert own.argv.count("--otlp-traces-endpoint") == 1 and "http://mine" in own.argv
    silent = engine("vllm", traces, **{"disable-log-stats": True})  # vLLM's tracing fails without its statistics
    for made in (own, silent, engine("vllm", None), engine("simulator", traces)):
        assert "http://c/v1/traces" not in made.argv and "OTEL_TRACES_SAMPLER" not in made.env


def test_off_opentelemetry_is_not_imported() -> None:
    code = (
        "import sys, serving.gateway.app, serving.settings as s, serving.telemetry.tracing as t\n"
        "assert t.tracing(s.Settings(), 'g', 'n', None) is None\n"
        "print([m for m in sys.modules if m.startswith('opentelemetry')])"
    )
    root = Path(__file__).resolve().parents[2]
    env = {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr

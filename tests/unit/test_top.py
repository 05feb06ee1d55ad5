"""`steelyard top`: a frame is what two expositions and the directory's table say."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import socket
import subprocess
import sys
import termios
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from rich.console import Console
from typer.testing import CliRunner

from serving.cli.frame import Frame, frame, read
from serving.cli.main import app
from serving.cli.top import _Keyboard, view
from serving.fleet.endpoint import Endpoint, Failure, Snapshot, State, VersionFacts
from serving.fleet.history import Change
from serving.telemetry.metrics import GatewayMetrics, expose_up, merge, set_all

NOW = 1_793_534_400.0
ENGINE = {"component": "engine", "model": "tiny", "version": "v1", "node": "10.0.0.5"}


def gateway(requests: int, *, broken: int = 0, ttft_s: float = 0.03) -> str:
    """A gateway's own exposition after so many streams."""
    metrics = GatewayMetrics(CollectorRegistry())
    tiny = metrics.of("tiny", "v1")
    for _ in range(requests):
        tiny.request_done("/v1/chat/completions", 200, "ok", 0.5)
        meter = tiny.stream(0.0)
        meter.chunk(ttft_s)
        meter.flush()
    for _ in range(broken):
        tiny.request_done("/v1/chat/completions", 502, "engine_broken", 0.5)
    tiny.held.inc(5)
    tiny.running.inc(3)
    tiny.waiting("default").inc(2)
    set_all(metrics.replicas, {("tiny", "v1", "READY"): 2, ("tiny", "v1", "FAILED"): 1, ("idle", "v1", "READY"): 0})
    set_all(metrics.replicas_required, {("tiny", "v1"): 1, ("idle", "v1"): 0})
    return metrics.text()


def engine(tokens: int, running: int = 3, kv: float = 0.25) -> str:
    return (
        f'vllm:num_requests_running{{engine="0"}} {running}\nvllm:num_requests_waiting{{engine="0"}} 1\n'
        f'vllm:kv_cache_usage_perc{{engine="0"}} {kv}\nvllm:generation_tokens_total{{engine="0"}} {tokens}\n'
        f'vllm:generation_tokens_created{{engine="0"}} 1\nvllm:e2e_request_latency_seconds_count{{engine="0"}} 1\n'
    )


GPUS = """\
steelyard_gpu_up{gpu="GPU-1",index="0",mig="",name="H200",model="tiny",version="v1",replica="tiny@v1#a"} 1
steelyard_gpu_sm_active_ratio{gpu="GPU-1",index="0",mig="",name="H200",model="tiny",version="v1",replica="tiny@v1#a"} 0.62
steelyard_gpu_kernel_active_ratio{gpu="GPU-1",index="0",mig="",name="H200",model="tiny",version="v1",replica="tiny@v1#a"} 1
steelyard_gpu_memory_used_bytes{gpu="GPU-1",index="0",mig="",name="H200",model="tiny",version="v1",replica="tiny@v1#a"} 75
steelyard_gpu_memory_total_bytes{gpu="GPU-1",index="0",mig="",name="H200",model="tiny",version="v1",replica="tiny@v1#a"} 100
steelyard_gpu_power_watts{gpu="GPU-1",index="0",mig="",name="H200",model="tiny",version="v1",replica="tiny@v1#a"} 512
steelyard_gpu_up{gpu="GPU-2",index="1",mig="",name="A100"} 0
steelyard_gpu_kernel_active_ratio{gpu="GPU-2",index="1",mig="",name="A100"} 0.5
"""


def scraped(*gateways: str, tokens: int, down: bool = False) -> str:
    """As `/metrics` merges it."""
    texts = [({"component": "gateway", "instance": f"gateway#{n}"}, text) for n, text in enumerate(gateways)]
    texts += [({**ENGINE, "instance": f"tiny@v1#{r}", "replica": f"tiny@v1#{r}"}, engine(tokens)) for r in "ab"]
    texts.append(({"component": "gpu", "instance": "gpu#10.0.0.5", "node": "10.0.0.5"}, GPUS))
    return merge([*texts, ({}, expose_up([({"instance": "tiny@v1#c"}, not down)]))])


def replica(id_: str, state: State = State.READY, reason: str = "") -> Endpoint:
    return Endpoint(
        id=f"tiny@v1#{id_}", model="tiny", version="v1", url="", state=state, slots=8, reason=reason, node="10.0.0.5"
    )


TABLE = Snapshot(
    epoch="e",
    number=1,
    complete=True,
    endpoints=(replica("a"), replica("b"), replica("c", State.FAILED, "the engine's server ended")),
    versions={
        "tiny@v1": VersionFacts(
            failures=1, failed_at=NOW - 60, reason="no memory",
            crashes=(Failure(NOW - 90, "10.0.0.5", "s", "process", "out of memory"),),
        )
    },
)  # fmt: skip
CHANGE = Change(version_id="tiny@v1", at=NOW - 30, before=1, after=2, cause="load", reason="5 held, 4 fit")


@pytest.fixture(scope="module")
def shown() -> Frame:
    oldest = read(scraped(gateway(0), gateway(0), tokens=0), 70.0)
    before = read(scraped(gateway(10), gateway(10), tokens=1000), 98.0)
    now = read(scraped(gateway(15), gateway(12, broken=1), tokens=1500, down=True), 100.0)
    return frame(now, before, oldest, table=TABLE, changes=[CHANGE], clock=NOW)


def test_a_version_is_the_sum_of_its_gateways_and_replicas(shown: Frame) -> None:
    idle, tiny = shown.versions
    assert (shown.gateways, shown.interval_s, shown.window_s) == (2, 2.0, 30.0)
    assert (tiny.id, tiny.states, tiny.required) == ("tiny@v1", {"FAILED": 1, "READY": 2}, True)
    assert (tiny.held, tiny.running, tiny.waiting, tiny.slots, tiny.kv_usage) == (10, 6, 4, 16, 0.25)
    assert (tiny.tokens_per_s, tiny.requests_per_s, tiny.failed_per_s) == (500.0, 3.5, 0.0)
    assert tiny.ttft_p95_s is not None and 0.02 < tiny.ttft_p95_s <= 0.04
    assert (idle.id, idle.states, idle.required, idle.ttft_p95_s) == ("idle@v1", {}, False, None)


def test_a_replica_has_the_directorys_state_and_its_engines_load(shown: Frame) -> None:
    a, _, c = shown.versions[1].replicas
    assert (a.state, a.running, a.slots, a.waiting, a.kv_usage, a.tokens_per_s) == ("READY", 3, 8, 1, 0.25, 250.0)
    assert (c.state, c.kv_usage, c.tokens_per_s, c.reason) == ("FAILED", None, None, "the engine's server ended")


def test_a_gpu_shows_what_it_really_did_where_it_says_so(shown: Frame) -> None:
    first, second = shown.gpus
    assert (first.holder, first.busy, first.exact, first.memory, first.watts) == ("tiny@v1#a", 0.62, True, 0.75, 512)
    assert (second.holder, second.busy, second.exact, second.memory, second.up) == ("", 0.5, False, None, False)


def test_decisions_and_faults_tell_when_and_why(shown: Frame) -> None:
    assert [(e.at, e.what, e.text) for e in shown.decisions] == [(NOW - 30, "tiny@v1", "1 -> 2  load: 5 held, 4 fit")]
    assert [e.text for e in shown.faults] == [
        "a replica failed on 10.0.0.5: out of memory",
        "1 start failed: no memory",
        "gives no metrics",
        "is FAILED: the engine's server ended",
    ]


def test_a_first_frame_has_no_rates_and_a_restarted_engine_no_negative_ones() -> None:
    text = scraped(gateway(3), tokens=500)
    first = frame(read(text, 1.0)).versions[1]
    assert (first.tokens_per_s, first.requests_per_s, first.ttft_p95_s) == (None, None, None)
    later = frame(read(scraped(gateway(3), tokens=100), 3.0), read(text, 1.0)).versions[1]
    assert (later.tokens_per_s, later.requests_per_s, later.ttft_p95_s) == (100.0, 0.0, None)


def test_without_the_directory_the_gateways_view_stays() -> None:
    shown = frame(read(scraped(gateway(1), tokens=1), 1.0))
    tiny = shown.versions[1]
    assert (shown.directory, tiny.states, tiny.slots) == (False, {"FAILED": 1, "READY": 2}, None)
    assert [r.id for r in tiny.replicas] == ["tiny@v1#a", "tiny@v1#b"]
    assert "not known: the directory was not asked" in printed(shown)


def test_an_empty_stack_is_a_frame_too() -> None:
    assert "faults" in printed(frame(read("", 1.0)))


def printed(shown: Frame, width: int = 150) -> str:
    out = io.StringIO()
    Console(file=out, width=width, highlight=False).print(
        view(shown, "http://127.0.0.1:8000", NOW, "no gateway answers")
    )
    return out.getvalue()


def test_the_view_has_every_figure_and_fits_its_terminal(shown: Frame) -> None:
    text = printed(shown)
    for told in (
        "tiny@v1#c",
        "6/16",
        "25%",
        "████",
        "512 W",
        "50%*",
        "lost",
        "1 -> 2  load",
        "out of memory",
        "no gateway answers",
    ):
        assert told in text
    assert max(len(line) for line in printed(shown, 80).splitlines()) <= 80


def test_a_frame_is_plain_data(shown: Frame) -> None:
    import msgspec

    assert json.loads(json.dumps(msgspec.to_builtins(shown)))["versions"][1]["slots"] == 16


def test_what_an_operator_can_mend_is_one_line(tmp_path: Path) -> None:
    def said() -> str:
        found = CliRunner().invoke(app, ["top", "--once", "--state-dir", str(tmp_path)])
        assert (found.exit_code, found.stdout) == (1, "")
        return found.stderr

    assert said().startswith(f"error: cannot read the API key {tmp_path}/api-key")
    (tmp_path / "api-key").write_text("sk-steelyard-x")
    (tmp_path / "api-key").chmod(0o600)
    with socket.socket() as taken, pytest.MonkeyPatch.context() as env:  # bound and not listening: refused
        taken.bind(("127.0.0.1", 0))
        env.setenv("STEELYARD_PORT", str(taken.getsockname()[1]))
        assert re.fullmatch(
            r"error: no gateway answers at http://127\.0\.0\.1:\d+: .*refused.*`steelyard up`\n", said()
        )


def test_keys_are_known_by_what_terminals_send_for_them() -> None:
    ours, theirs = os.pipe()
    try:
        keyboard = _Keyboard(ours)
        os.write(theirs, b"x\x1b[C\x1b[B\x1bOAG\x1b[5")  # of no meaning: x, right; and the beginning of a PgUp
        assert [keyboard.key_within(0.01) for _ in range(4)] == ["down", "up", "end", ""]
        os.write(theirs, b"~\x1bQ")
        assert [keyboard.key_within(5.0) for _ in range(2)] == ["page up", "quit"]
        os.close(theirs)
        assert keyboard.key_within(5.0) == "quit"
    finally:
        os.close(ours)


class Terminal:
    """`steelyard top` in a terminal of 12 lines, of a gateway that serves 40 models."""

    def __init__(self, state_dir: Path, port: int) -> None:
        self.screen, theirs = pty.openpty()
        termios.tcsetwinsize(self.screen, (12, 100))
        env = {**os.environ, "STEELYARD_PORT": str(port), "STEELYARD_STATE_DIR": str(state_dir), "TERM": "xterm"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "serving.cli.main", "top", "--interval", "60"],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={name: value for name, value in env.items() if name not in ("LINES", "COLUMNS")},
            start_new_session=True,
        )
        os.close(theirs)

    def type(self, keys: bytes) -> None:
        os.write(self.screen, keys)

    def until(self, last: str) -> list[str]:
        """The screen, once its last line begins so."""
        told, deadline = b"", time.monotonic() + 30
        while time.monotonic() < deadline and select.select([self.screen], [], [], 30)[0]:
            told += os.read(self.screen, 65536)
            lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", told.decode(errors="ignore").split("\x1b[H")[-1]).splitlines()
            if lines and lines[-1].startswith(last):
                return [line.rstrip() for line in lines]
        raise AssertionError(f"not shown: {last}; it showed {told!r}")


def test_what_does_not_fit_is_counted_and_scrolled_to(tmp_path: Path) -> None:
    metrics = GatewayMetrics(CollectorRegistry())
    set_all(metrics.replicas, {(f"model-{n:02}", "v1", "READY"): 0 for n in range(40)})
    text = merge([({"component": "gateway", "instance": "g"}, metrics.text())]).encode()

    class Metrics(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None: ...

    (tmp_path / "api-key").write_text("sk-steelyard-x")
    (tmp_path / "api-key").chmod(0o600)
    with ThreadingHTTPServer(("127.0.0.1", 0), Metrics) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        terminal = Terminal(tmp_path, server.server_address[1])
        try:
            # Of 48 lines below the first one 10 fit beside the line that says so.
            lines = terminal.until("0 lines above, 38 below")
            assert len(lines) == 12 and lines[0].startswith("Steelyard http://") and lines[3].startswith("model-00@v1")
            terminal.type(b"\x1b[B\x1b[B")
            assert terminal.until("2 lines above, 36 below")[1].startswith("model-00@v1")
            terminal.type(b"\x1b[6~")
            assert terminal.until("11 lines above, 27 below")[1].startswith("model-09@v1")
            terminal.type(b"G\x1b[B")
            lines = terminal.until("38 lines above, 0 below")
            assert lines[-3:-1] == ["faults", "  not known: the directory was not asked"]
            terminal.type(b"\x1b[Aq")
            terminal.until("37 lines above, 1 below")
            assert terminal.process.wait(10) == 0
        finally:
            terminal.process.kill()
            terminal.process.wait()
            os.close(terminal.screen)
            server.shutdown()

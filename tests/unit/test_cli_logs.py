"""`steelyard logs`: every process's lines of one model or request, by time."""

from __future__ import annotations

import itertools
import json
import logging
import os
from datetime import datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from serving.cli.logs import Folder, wanted_by
from serving.cli.main import app
from serving.engine import process
from serving.telemetry.logs import RequestLine, RequestLog, setup

NOON = datetime(2026, 11, 1, 12).timestamp()


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """What a stack of two models left: two requests of tiny, one of other that failed, and their processes' lines."""
    folder = tmp_path / "logs"
    with RequestLog(folder) as log:
        log.write(
            RequestLine(
                ts=NOON + 3,
                request_id="req_a",
                model="tiny",
                version="v1",
                status=200,
                reason="ok",
                queue_ms=1.5,
                ttft_ms=8.0,
                itl_p50_ms=4.0,
                itl_max_ms=1200.0,
                e2e_ms=90.0,
                prompt_tokens=7,
                completion_tokens=6,
                finish="stop",
                attempts=2,
                replica="tiny@v1#1",
            )
        )
        log.write(
            RequestLine(
                ts=NOON + 4,
                request_id="req_ab",
                trace_id="4bf92f3577b34da6a3ce929d0e0e4736",
                model="tiny",
                version="v2",
                status=200,
            )
        )
        log.write(RequestLine(ts=NOON + 5, request_id="req_c", model="other", version="v1", status=502, level="error"))
    ours = setup("gateway", folder)
    try:
        record = logging.makeLogRecord(
            {"name": "g", "levelno": 30, "levelname": "WARNING", "msg": "attempt 1 failed: tiny@v1#0: died",
             "created": NOON + 2, "request_id": "req_a"}
        )  # fmt: skip
        logging.getLogger().handle(record)
    finally:
        ours.close()
    engine = folder / "engines" / "tiny@v1" / "1.0.log"
    engine.parent.mkdir(parents=True)
    engine.write_text(
        "simulator ready\n"
        "(APIServer pid=7) INFO 11-01 12:00:01 [logger.py:40] Received request chatcmpl-req_a-0\n"
        "(EngineCore pid=8) ERROR 11-01 12:00:02 [core.py:1] it broke, Authorization: Bearer s3cret-of-somebody\n"
        "Traceback (most recent call last):\n"
    )
    os.utime(engine, (NOON + 60, NOON + 60))
    return tmp_path


def told(state: Path, *args: str) -> list[dict[str, object]]:
    found = CliRunner().invoke(app, ["logs", *args, "--json", "--state-dir", str(state)])
    assert found.exit_code == 0, found.output
    return [json.loads(line) for line in found.stdout.splitlines()]


def test_a_trace_leads_to_its_request(state: Path) -> None:
    [line] = told(state, "4bf92f3577b34da6a3ce929d0e0e4736")
    assert line["request_id"] == "req_ab"


def test_a_request_is_its_line_and_every_line_that_carries_its_id(state: Path) -> None:
    assert [line["source"] for line in told(state, "req_a")] == ["engines/tiny@v1/1.0", "gateway-0", "requests-0"]


def test_a_model_is_its_requests_its_engines_and_what_is_said_of_its_replicas(state: Path) -> None:
    assert [(line["source"], line["event"]) for line in told(state, "tiny")] == [
        *[("engines/tiny@v1/1.0", "engine")] * 4, ("gateway-0", "log"), *[("requests-0", "request")] * 2,
    ]  # fmt: skip


def test_a_version_is_not_another_one(state: Path) -> None:
    assert [line["request_id"] for line in told(state, "tiny@v2")] == ["req_ab"]
    assert len(told(state, "tiny@v1")) == 6


def test_errors_are_what_went_wrong(state: Path) -> None:
    assert [line["level"] for line in told(state, "tiny", "--errors")] == ["error", "error", "warning"]
    assert [line["request_id"] for line in told(state, "other", "--errors")] == ["req_c"]


def test_an_engines_secrets_are_masked(state: Path) -> None:
    printed = CliRunner().invoke(app, ["logs", "tiny", "--state-dir", str(state)]).stdout
    assert "Authorization: Bearer ***" in printed and "s3cret" not in printed


def test_a_request_reads_as_one_line(state: Path) -> None:
    printed = CliRunner().invoke(app, ["logs", "req_a", "--state-dir", str(state)]).stdout.splitlines()[-1]
    assert "req_a  200  tiny@v1  ok  wait 1.5 ms  ttft 8.0 ms  itl p50 4.0 ms  max 1.20 s" in printed
    assert printed.endswith("tokens 7+6  finish stop  attempts 2  on tiny@v1#1")


def test_what_is_not_known_is_said_in_one_line(state: Path) -> None:
    found = CliRunner().invoke(app, ["logs", "nobody", "--state-dir", str(state)])
    assert (found.exit_code, found.stdout) == (1, "")
    assert "nothing in" in found.stderr and "'nobody'; models that ran here: tiny" in found.stderr


def test_a_known_one_without_young_lines_is_no_error(state: Path) -> None:
    found = CliRunner().invoke(app, ["logs", "req_c", "--since", "0s", "--state-dir", str(state)])
    assert (found.exit_code, found.stdout) == (0, "")
    assert "req_c: no such line in the last 0s" in found.stderr
    for nobody in ("", "@v1"):
        bad = CliRunner().invoke(app, ["logs", nobody, "--state-dir", str(state)])
        assert (bad.exit_code, bad.stdout) == (1, "") and bad.stderr.startswith(
            f"error: {nobody!r} names nothing. give"
        )
    bad = CliRunner().invoke(app, ["logs", "req_c", "--since", "ten", "--state-dir", str(state)])
    assert (bad.exit_code, bad.stderr) == (1, "error: --since ten is no duration. write it as 90s, 10m, 2h or 1d\n")


def test_a_file_is_followed_through_its_rotation_and_its_truncation(tmp_path: Path) -> None:
    count = itertools.count()

    def line() -> str:
        return json.dumps({"ts": "2026-11-01T12:00:00Z", "level": "info", "event": "request", "request_id": "r",
                           "status": next(count)}, separators=(",", ":"))  # fmt: skip

    path = tmp_path / "requests-0.jsonl"
    wanted = wanted_by("r", a_model=False)
    folder = Folder(tmp_path)

    def new() -> list[int]:
        return [found.told["status"] for found in folder.new_lines(wanted, 0.0) if found.told]

    first = line()
    path.write_text(first[:20])
    assert new() == []  # not whole yet
    with path.open("a") as f:
        f.write(first[20:] + "\n" + line() + "\n")
    assert new() == [0, 1]
    with path.open("a") as f:
        f.write(line() + "\n")
    path.rename(tmp_path / "requests-0.jsonl.1")
    path.write_text(line() + "\n")
    assert sorted(new()) == [2, 3]
    path.write_text("")
    assert new() == []
    path.write_text(line() + "\n")
    assert new() == [4]
    folder.close()


def test_an_engines_log_is_cut_where_it_grows_and_old_ones_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "LOG_BYTES", 100)
    monkeypatch.setattr(process, "LOGS_KEPT", 2)
    path = tmp_path / "a.0.log"
    with path.open("ab") as engine:
        engine.write(b"x" * 100)
        engine.flush()
        process.rotate(path)
        assert path.stat().st_size == 100
        engine.write(b"y")
        engine.flush()
        process.rotate(path)
        engine.write(b"z")
    assert (path.read_bytes(), (tmp_path / "a.0.log.1").read_bytes()) == (b"z", b"x" * 100 + b"y")
    assert (tmp_path / "a.0.log.1").stat().st_mode & 0o077 == 0
    for age, name in enumerate(("b.0.log", "c.0.log")):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (NOON - age, NOON - age))
    process.forget_old_logs(tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.0.log", "a.0.log.1", "b.0.log"]

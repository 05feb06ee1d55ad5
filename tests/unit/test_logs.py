"""Logs: JSON lines, bounded, without prompts and keys."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest

from serving.telemetry import logs
from serving.telemetry.logs import RequestLine, RequestLog, setup

TOKEN = "sk-steelyard-0123abcd-" + "x" * 43


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_request_is_one_line_with_fixed_fields(tmp_path: Path) -> None:
    with RequestLog(tmp_path) as log:
        log.write(RequestLine(ts=1_800_000_000.5, request_id="r1", model="tiny", status=200, ttft_ms=8.5, stream=True))
    (line,) = lines(log.path)
    assert line.pop("ts") == "2027-01-15T08:00:00.500000Z"
    assert set(line) == set(RequestLine.__struct_fields__) - {"ts"}
    assert (line["level"], line["event"], line["request_id"], line["ttft_ms"]) == ("info", "request", "r1", 8.5)


def test_no_field_can_hold_what_a_client_wrote() -> None:
    forbidden = {"prompt", "messages", "body", "headers", "token", "key", "text", "completion"}
    assert forbidden.isdisjoint(RequestLine.__struct_fields__)


def test_a_key_used_as_a_request_id_is_masked(tmp_path: Path) -> None:
    with RequestLog(tmp_path) as log:
        log.write(RequestLine(ts=1.0, request_id=f"{TOKEN}\udc80\n"))
    assert lines(log.path)[0]["request_id"] == "sk-steelyard-0123abcd-***\\udc80\n"


def test_a_full_queue_drops_and_counts_and_says_so(tmp_path: Path) -> None:
    log = RequestLog(tmp_path, queue_lines=4)
    log._pipe._file.acquire()  # the disk hangs
    try:
        for n in range(50):
            log.write(RequestLine(ts=1.0, request_id=str(n)))
        assert log.dropped >= 44
    finally:
        log._pipe._file.release()
    while not log._pipe.queue.empty():  # type: ignore[attr-defined]
        time.sleep(0.001)
    log.write(RequestLine(ts=1.0, request_id="after"))
    log.close()
    found = lines(log.path)
    assert len([line for line in found if line["event"] == "request"]) + log.dropped == 51
    assert [line["msg"] for line in found if line["event"] == "log"] == [f"{log.dropped} log lines dropped"]


def test_two_processes_never_share_a_file_and_restarts_reuse_it(tmp_path: Path) -> None:
    first, second = RequestLog(tmp_path), RequestLog(tmp_path)
    assert (first.path.name, second.path.name) == ("requests-0.jsonl", "requests-1.jsonl")
    first.close()
    third = RequestLog(tmp_path)
    assert third.path == first.path
    second.close()
    third.close()


def test_files_rotate_and_are_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MAX_BYTES", 2000)
    with RequestLog(tmp_path) as log:
        for n in range(100):
            log.write(RequestLine(ts=1.0, request_id=str(n)))
    files = sorted(tmp_path.glob("requests-0.jsonl*"))
    assert len(files) == 1 + logs.BACKUPS
    assert {file.stat().st_mode & 0o007 for file in files} == {0}
    assert all(file.stat().st_size <= 2000 for file in files)


def test_ordinary_records_are_lines_with_the_traceback_and_without_keys(tmp_path: Path) -> None:
    log = setup("gateway", tmp_path)
    try:
        try:
            raise ValueError(f"header was Bearer {TOKEN}")
        except ValueError:
            logging.getLogger("a.b").exception("refused %s", TOKEN, extra={"request_id": "r1"})
        logging.getLogger("a.b").debug("not at this level")
    finally:
        log.close()
    logging.getLogger("a.b").warning("after the end")
    (line,) = lines(log.path)
    assert (line["level"], line["process"], line["logger"], line["request_id"]) == ("error", "gateway", "a.b", "r1")
    assert line["msg"] == "refused sk-steelyard-0123abcd-***"
    assert "ValueError: header was Bearer sk-steelyard-0123abcd-***" in line["exc"]


def test_close_twice_is_once(tmp_path: Path) -> None:
    log = RequestLog(tmp_path)
    log.close()
    log.close()

"""JSON-line logs: one line per request, and ordinary process logs. Never a prompt, never a key.

Lines are encoded and written by a listener thread. Its queue is bounded: a full or slow disk loses lines, which are
counted, and never holds a request up. Files are `<directory>/<name>-<n>.jsonl`, rotated; `n` is the lowest number that
no living process holds, so restarts do not pile up files and two processes never rotate the same one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from datetime import UTC, datetime
from io import TextIOWrapper
from logging.handlers import QueueHandler, QueueListener, RotatingFileHandler
from pathlib import Path
from typing import Any, Self

import msgspec
from filelock import FileLock, Timeout

from serving.telemetry.masking import masked

QUEUE_LINES = 8192
BATCH_S = 0.05
MAX_BYTES = 64 * 1024 * 1024
BACKUPS = 4
_MAX_PROCESSES = 256
_MAX_TEXT = 16_384
_CLOSE_S = 5.0


class RequestLine(msgspec.Struct, kw_only=True, gc=False):
    """What is kept of one request. No field holds what a client wrote, except the request id it may choose.

    `ts` is epoch seconds (written as UTC ISO 8601), `_ms` milliseconds; `reason` is one of the words the metrics use.
    """

    ts: float
    level: str = "info"
    event: str = "request"
    request_id: str
    trace_id: str | None = None  # of one whose trace is sampled
    key_id: str | None = None
    model: str | None = None
    version: str | None = None
    adapter: str | None = None
    route: str | None = None
    status: int = 0
    reason: str = ""
    stream: bool = False
    replica: str | None = None
    attempts: int = 0
    queue_ms: float | None = None
    ttft_ms: float | None = None
    itl_p50_ms: float | None = None  # as exact as the metric's buckets
    itl_max_ms: float | None = None
    e2e_ms: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    aborted_tokens: int | None = None  # of an answer without an end, handed out until then, as its events tell
    events: int = 0
    finish: str | None = (
        None  # why the engine ended the answer, in its own word: stop, length, end_turn, completed, ...
    )
    client_gone: bool = False


# What goes through the queue: a `LogRecord` costs more than all else that is done for a request's line.
_Line = RequestLine | logging.LogRecord


class RequestLog:
    """The request log of one gateway. `write` costs a queue put."""

    def __init__(self, directory: Path, *, name: str = "requests", queue_lines: int = QUEUE_LINES) -> None:
        self._pipe = _Pipe(directory, name, queue_lines)
        self.path = self._pipe.path

    def write(self, line: RequestLine) -> None:
        """Hand the line over; it is dropped and counted when the queue is full."""
        self._pipe.enqueue(line)

    @property
    def dropped(self) -> int:
        """Lines lost so far, to a full queue or a failing disk."""
        return self._pipe.dropped

    def close(self) -> None:
        """Write what is queued and close the file."""
        self._pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ProcessLog:
    """What `setup` made; `close` undoes it."""

    def __init__(self, pipe: _Pipe, logger: logging.Logger) -> None:
        self._pipe, self._logger = pipe, logger
        self.path = pipe.path

    @property
    def dropped(self) -> int:
        """Lines lost so far."""
        return self._pipe.dropped

    def close(self) -> None:
        """Detach from the logger, write what is queued and close the file."""
        self._logger.removeHandler(self._pipe)
        self._pipe.close()


def setup(process_name: str, directory: Path, level: int = logging.INFO) -> ProcessLog:
    """Send this process's ordinary logging to `<directory>/<process_name>-<n>.jsonl`, beside handlers already there.

    `extra={"request_id": ...}` puts the id on the line.
    """
    root = logging.getLogger()
    pipe = _Pipe(directory, process_name, QUEUE_LINES)
    pipe.setLevel(level)
    if root.getEffectiveLevel() > level:
        root.setLevel(level)
    root.addHandler(pipe)
    return ProcessLog(pipe, root)


class _Pipe(QueueHandler):
    """Queue, listener thread and file of one log."""

    def __init__(self, directory: Path, name: str, lines: int) -> None:
        lines_queue: queue.Queue[_Line | None] = queue.Queue(maxsize=lines)
        super().__init__(lines_queue)
        self.path, self._claim = _claim(directory, name)
        self._file = _File(self.path, _Lines(name))
        self._listener = _Listener(lines_queue, self._file)
        self._full = self._reported = 0
        self._closed = False
        self._listener.start()

    @property
    def dropped(self) -> int:
        return self._full + self._file.failed

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        # The base class copies and formats every record on the caller's thread. Only what may change or holds the
        # request alive is settled here: the arguments and the traceback's frames.
        if record.args:
            record.msg, record.args = record.getMessage(), None
        if record.exc_info:
            record.exc_text = record.exc_text or logging.Formatter().formatException(record.exc_info)
            record.exc_info = None
        return record

    def enqueue(self, record: _Line) -> None:
        try:
            self.queue.put_nowait(record)
            if self._full > self._reported:
                lost, self._reported = self._full - self._reported, self._full
                self.queue.put_nowait(
                    logging.makeLogRecord({"msg": f"{lost} log lines dropped", "levelname": "WARNING"})
                )
        except queue.Full:
            self._full += 1

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._listener.stop()
        self._file.close()
        self._claim.release()
        super().close()


class _Listener(QueueListener):
    """Writes what came within `BATCH_S` at once: a thread that wakes for every line takes the interpreter from the event
    loop each time."""

    def __init__(self, lines: queue.Queue[_Line | None], file: _File) -> None:
        super().__init__(lines, file)
        self._file = file
        self._lines = lines
        self._closing = threading.Event()

    def enqueue_sentinel(self) -> None:
        # The base class does not wait, and raises when the queue is full.
        self._closing.set()
        self._lines.put(None)

    def _monitor(self) -> None:
        ended = False
        while not ended:
            batch = [self._lines.get()]
            self._closing.wait(BATCH_S)
            with contextlib.suppress(queue.Empty):
                while len(batch) < self._lines.maxsize:
                    batch.append(self._lines.get_nowait())
            ended = None in batch
            self._file.write_all([record for record in batch if record is not None])


class _File(RotatingFileHandler):
    """A rotating file readable by owner and group. A line that cannot be written is counted, not shouted about."""

    failed = 0

    def __init__(self, path: Path, lines: _Lines) -> None:
        super().__init__(path, maxBytes=MAX_BYTES, backupCount=BACKUPS, encoding="utf-8")
        self._lines = lines

    def _open(self) -> TextIOWrapper:
        return open(self.baseFilename, "a", encoding="utf-8", opener=lambda path, flags: os.open(path, flags, 0o640))

    def write_all(self, records: list[_Line]) -> None:
        """All of them, with one look at the size."""
        if not records:
            return
        lines = []
        for record in records:
            try:
                lines.append(self._lines.line(record) + "\n")
            except Exception:  # a line that cannot be written must not cost the others
                self.failed += 1
        try:
            self._write_pieces(lines)
        except (OSError, ValueError):
            self.failed += len(lines)

    def _write_pieces(self, lines: list[str]) -> None:
        """One write and flush, or one per file where the lines fill more than one."""
        assert self.stream is not None
        size, piece = self.stream.tell(), list[str]()
        for line in lines:
            if size and size + len(line) > self.maxBytes:
                self.stream.write("".join(piece))
                self.doRollover()
                size, piece = 0, []
            piece.append(line)
            size += len(line)
        self.stream.write("".join(piece))
        self.stream.flush()


class _Lines:
    """Request lines by their fields; ordinary records as ts, level, event, process, pid, logger, msg, exc."""

    def __init__(self, process: str) -> None:
        self._encode = msgspec.json.Encoder().encode
        self._process, self._pid = process, os.getpid()

    def line(self, record: _Line) -> str:
        if isinstance(record, RequestLine):
            fields = msgspec.structs.asdict(record)
            ts = datetime.fromtimestamp(record.ts, UTC)
            return self._encode({**fields, "ts": ts, "request_id": _clean(record.request_id)}).decode()
        ts = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, Any] = {
            "ts": ts,
            "level": record.levelname.lower(),
            "event": "log",
            "process": self._process,
            "pid": self._pid,
            "logger": record.name,
            "msg": _clean(str(record.msg)),
        }
        if (joined := getattr(record, "request_id", None)) is not None:
            line["request_id"] = _clean(str(joined))
        if record.exc_text:
            line["exc"] = _clean(record.exc_text)
        return self._encode(line).decode()


def _clean(text: str) -> str:
    # Lone surrogates (undecodable bytes in a path or header) would make the encoder refuse the whole line.
    cut = text if len(text) <= _MAX_TEXT else text[:_MAX_TEXT] + "..."
    return masked(cut).encode("utf-8", "backslashreplace").decode()


def _claim(directory: Path, name: str) -> tuple[Path, FileLock]:
    directory.mkdir(parents=True, exist_ok=True)
    for n in range(_MAX_PROCESSES):
        # Not a singleton: two logs in one process must not share a file either.
        lock = FileLock(directory / f".{name}-{n}.lock", timeout=0, is_singleton=False)
        try:
            lock.acquire()
        except Timeout:
            continue
        return directory / f"{name}-{n}.jsonl", lock
    raise OSError(f"{directory}: more than {_MAX_PROCESSES} processes log as {name}")

"""`steelyard logs`: what this node's processes wrote of a model or a request, merged by time.

Three kinds of line lie in the log folder: request lines and process lines, which are JSON, and what engines print. A line
without a time of its own (a traceback's) has the time and the level of the one before it.
"""

from __future__ import annotations

import heapq
import json
import os
import re
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import msgspec
import typer

from serving.cli import cluster
from serving.cli.term import one_line_errors
from serving.errors import OperatorError
from serving.settings import Settings, load_settings
from serving.telemetry.masking import masked

POLL_S = 0.5
_MAX_LINE = 1 << 20  # bytes of one line; what is longer comes in pieces
_LOOK_AHEAD = 64 * 1024
_WORSE = frozenset({"error", "critical"})
_NAME_SHOWN = 28

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|m|h|d)")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
# What vLLM puts before a line: `(EngineCore pid=1) ERROR 11-01 10:00:00 [core.py:1] text`, by the local clock.
_STAMPED = re.compile(r"(?:\([^)]*\) )*(DEBUG|INFO|WARNING|ERROR|CRITICAL) (\d\d)-(\d\d) (\d\d):(\d\d):(\d\d) ")
_LEVEL = re.compile(r"(?:\([^)]*\) )*(DEBUG|INFO|WARNING|ERROR|CRITICAL):? ")
_TELLS_ERROR = ("Traceback (most recent call last)", "Error: ")


class Line(msgspec.Struct, frozen=True):
    """One line. `told` is its JSON, None of what an engine printed."""

    ts: float  # epoch seconds
    source: str  # file it is in: requests-0, gateway-0, engines/tiny@v1/1a2b3c4d.0
    level: str
    text: str
    told: dict[str, Any] | None = None

    @property
    def is_request(self) -> bool:
        return self.told is not None and self.told.get("event") == "request"

    @property
    def bad(self) -> bool:
        """An error, a request that got no good answer, or a warning of our own processes; engines warn of much."""
        if self.is_request:
            assert self.told is not None
            refused = int(self.told.get("status") or 0) >= 400 and not self.told.get("client_gone")
            return self.level in _WORSE or refused
        return self.level in _WORSE or (self.told is not None and self.level == "warning")

    def data(self) -> dict[str, Any]:
        """For `--json`."""
        ts = datetime.fromtimestamp(self.ts, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        told = self.told if self.told is not None else {"level": self.level, "event": "engine", "msg": self.text}
        return {**told, "ts": ts, "source": self.source}

    def shown(self) -> str:
        at = datetime.fromtimestamp(self.ts).astimezone().strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
        return f"{at} {self.level:<7} {self.source:<{_NAME_SHOWN}} {self.text}"


_GROWING = ("*.jsonl", "up.log", "engines/*/*.log")
_ROTATED = ("*.jsonl.[0-9]*", "engines/*/*.log.[0-9]*")

Wanted = Callable[[bytes, str], bool]
Target = Annotated[
    str,
    typer.Argument(
        help="MODEL, MODEL@VERSION, an adapter, or the id of a request or a trace.", metavar="MODEL|REQUEST_ID|TRACE_ID"
    ),
]


def wanted_by(target: str, *, a_model: bool) -> Wanted:
    """Whether a line, as it stands in the file of that source, is of `target`: MODEL, MODEL@VERSION, or else (unless
    `a_model`) an adapter or the id of a request or a trace, which any process may mention.

    Decided on the bytes: most lines are of something else, and need not be parsed.
    """
    name, _, version = target.partition("@")
    quoted = re.escape(name.encode())
    of_version = rb"@%b(?![A-Za-z0-9._-])" % re.escape(version.encode()) if version else b"@"
    if version:
        request = re.compile(rb'"model":"%b","version":"%b"' % (quoted, re.escape(version.encode())))
    else:
        request = re.compile(rb'"(?:model|adapter|request_id|trace_id)":"%b"' % quoted)
    words = [rb"(?<![A-Za-z0-9._-])%b%b" % (quoted, of_version)]
    if not a_model and not version:
        words.append(rb"(?<![A-Za-z0-9_])%b(?![A-Za-z0-9_])" % quoted)  # vLLM puts something before and after an id
    mention = re.compile(b"|".join(words))
    needle = name.encode()

    def wanted(raw: bytes, source: str) -> bool:
        if source.startswith("engines/"):
            served = source.split("/")[1]
            if served == target or (not version and served.partition("@")[0] == name):
                return True
        if needle not in raw:
            return False
        return bool((request if b'"event":"request"' in raw else mention).search(raw))

    return wanted


def parsed(raw: bytes, source: str, before: Line, near: float) -> Line | None:
    """The line, or None for an empty one. `before` is the one before it in its file, which was written last at `near`."""
    if raw.startswith(b"{"):
        try:
            told = msgspec.json.decode(raw)
            return Line(datetime.fromisoformat(told["ts"]).timestamp(), source, str(told["level"]), _text(told), told)
        except (msgspec.MsgspecError, LookupError, TypeError, ValueError):
            pass  # torn by a full disk, or an engine's own
    text = masked(raw.decode(errors="replace")).rstrip()
    if not text:
        return None
    ts, level = before.ts, before.level
    if stamped := _STAMPED.match(text):
        ts = max(ts, _local(stamped, near))
    if leveled := _LEVEL.match(text):
        level = leveled[1].lower()
    elif any(words in text for words in _TELLS_ERROR):
        level = "error"
    return Line(ts, source, level, text)


def _local(stamped: re.Match[str], near: float) -> float:
    """The engine tells no year: the one that puts it nearest to when its file was written last."""
    numbers = [int(n) for n in stamped.groups()[1:]]
    year = datetime.fromtimestamp(near).year
    found = []
    for y in (year - 1, year, year + 1):
        try:
            found.append(datetime(y, *numbers).timestamp())  # type: ignore[arg-type]
        except ValueError:  # 29 February
            continue
    return min(found, key=lambda ts: abs(ts - near), default=near)


def _text(told: dict[str, Any]) -> str:
    """One readable line of a JSON one."""
    if told.get("event") != "request":
        rid = f" [{told['request_id']}]" if told.get("request_id") else ""
        exc = f"\n{told['exc']}" if told.get("exc") else ""
        return f"{told.get('msg', '')}{rid}{exc}"
    of = "@".join(told[part] for part in ("model", "version") if told.get(part)) or "-"
    if told.get("adapter"):
        of += f" ({told['adapter']})"
    parts = [str(told["request_id"]), str(told["status"]), of, told.get("route"), told.get("reason")]
    parts.append("client gone" if told.get("client_gone") and told.get("reason") != "client_gone" else None)
    for name, key in (
        *(("wait", "queue_ms"), ("ttft", "ttft_ms"), ("itl p50", "itl_p50_ms"), ("max", "itl_max_ms")),
        ("total", "e2e_ms"),
    ):
        if told.get(key) is not None:
            parts.append(f"{name} {_ms(told[key])}")
    if told.get("prompt_tokens") is not None or told.get("completion_tokens") is not None:
        parts.append(f"tokens {told.get('prompt_tokens') or 0}+{told.get('completion_tokens') or 0}")
    if told.get("aborted_tokens"):
        parts.append(f"aborted after {told['aborted_tokens']} tokens")
    parts.append(f"finish {told['finish']}" if told.get("finish") else None)
    parts.append(f"attempts {told['attempts']}" if (told.get("attempts") or 0) > 1 else None)
    parts.append(f"on {told['replica']}" if told.get("replica") else None)
    parts.append(f"trace {told['trace_id']}" if told.get("trace_id") else None)
    return "  ".join(part for part in parts if part)


def _ms(value: float) -> str:
    return f"{value / 1e3:.2f} s" if value >= 1000 else f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms"


class Tail:
    """One file, read from its beginning and then as it grows, whatever name it has by then."""

    def __init__(self, path: Path, source: str) -> None:
        self.source = source
        self._file: BinaryIO = open(path, "rb")  # noqa: SIM115 - kept while it grows
        self._written_at = path.stat().st_mtime
        self._offset, self._rest = 0, b""
        self._before = Line(self._began(), source, "info", "")

    def lines(self, wanted: Wanted) -> Iterator[Line]:
        """The whole lines that are new since the last call."""
        if self._file.seek(0, 2) < self._offset:  # it was cut
            self._offset, self._rest = 0, b""
        self._file.seek(self._offset)
        while piece := self._file.readline(_MAX_LINE):
            self._offset += len(piece)
            if not piece.endswith(b"\n") and len(self._rest) + len(piece) < _MAX_LINE:
                self._rest += piece
                break
            raw, self._rest = self._rest + piece, b""
            # What is told in JSON says its own time; of other lines each depends on those before it.
            mine = wanted(raw, self.source)
            if not mine and raw.startswith(b"{"):
                continue
            line = parsed(raw, self.source, self._before, self._written_at)
            if line is None:
                continue
            if line.told is None:
                self._before = line
            if mine:
                yield line

    def _began(self) -> float:
        """When the first lines were written: at the first time that any of them says."""
        for raw in self._file.read(_LOOK_AHEAD).splitlines():
            if stamped := _STAMPED.match(raw.decode(errors="replace")):
                return _local(stamped, self._written_at)
        return self._written_at

    @property
    def gone(self) -> bool:
        """The file has no name any more: it was rotated away, and all of it is read."""
        found = os.fstat(self._file.fileno())
        return found.st_nlink == 0 and self._offset >= found.st_size

    def close(self) -> None:
        self._file.close()


class Folder:
    """The log folder of one node."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._patterns: tuple[str, ...] = (*_GROWING, *_ROTATED)
        self._tails: dict[int, Tail] = {}  # by inode: a file that is renamed meanwhile is not read twice

    def serves(self, name: str) -> bool:
        """Whether an engine of that model or version ever started here."""
        return any(name in (f.name, f.name.partition("@")[0]) for f in self._folder.glob("engines/*"))

    def models(self) -> list[str]:
        return sorted({f.name.partition("@")[0] for f in self._folder.glob("engines/*")})

    def new_lines(self, wanted: Wanted, since: float) -> Iterator[Line]:
        """What was written since the last call, by time; at first everything, but for files without a line since `since`."""
        self._look(since)
        for inode, tail in list(self._tails.items()):
            if tail.gone:
                tail.close()
                del self._tails[inode]
        yield from heapq.merge(*(tail.lines(wanted) for tail in self._tails.values()), key=lambda line: line.ts)

    def close(self) -> None:
        for tail in self._tails.values():
            tail.close()

    def _look(self, since: float) -> None:
        # Afterwards a numbered one is only the new name, or a copy, of what is read already.
        patterns, self._patterns = self._patterns, _GROWING
        for path in sorted(path for pattern in patterns for path in self._folder.glob(pattern)):
            try:
                found = path.stat()
                if found.st_ino not in self._tails and found.st_mtime >= since:
                    self._tails[found.st_ino] = Tail(path, self._source(path))
            except FileNotFoundError:  # rotated away since it was listed
                continue

    def _source(self, path: Path) -> str:
        return re.sub(r"\.(jsonl|log)(\.\d+)?$", "", str(path.relative_to(self._folder)))


def seconds(text: str) -> float:
    """`90s`, `10m`, `2h`, `1d`."""
    found = _DURATION.fullmatch(text)
    if found is None:
        raise OperatorError(f"--since {text} is no duration", "write it as 90s, 10m, 2h or 1d")
    return float(found[1]) * _SECONDS[found[2]]


def logs(
    target: Target,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is written from now on.")] = False,
    since: Annotated[str | None, typer.Option(help="Only what is younger: 90s, 10m, 2h, 1d.")] = None,
    errors: Annotated[
        bool, typer.Option("--errors", help="Only errors, our processes' warnings, and requests without a good answer.")
    ] = False,
    last: Annotated[
        int, typer.Option("--last", "-n", min=0, help="Of the lines there are, the last; 0 is all.")
    ] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="Print each line as JSON.")] = False,
    state_dir: Annotated[Path | None, typer.Option(help="Folder of keys, secrets, pid and logs.")] = None,
) -> None:
    """What the gateways, replicas, engines and the directory of this node wrote of a model or of one request, by time.

    It reads the log folder of this node alone: on a cluster of several, a request's line is on the node whose gateway
    answered it, and an engine's lines are where the engine runs. Run it on each.
    """
    with one_line_errors():
        settings = load_settings(state_dir=state_dir)
        shown = run(settings, target, follow=follow, since=since, errors=errors, last=last)
        try:
            for line in shown:
                print(json.dumps(line.data(), ensure_ascii=False) if as_json else line.shown(), flush=follow)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


def run(settings: Settings, target: str, *, follow: bool, since: str | None, errors: bool, last: int) -> Iterator[Line]:
    """The lines to show; endless with `follow`. Raises OperatorError when nothing is known of `target`."""
    if not target.partition("@")[0]:
        raise OperatorError(f"{target!r} names nothing", "give a model, or the id of a request or a trace")
    if not settings.log_dir.is_dir():
        raise OperatorError(f"there are no logs in {settings.log_dir}", "name the stack's state folder: --state-dir")
    young = time.time() - seconds(since) if since else 0.0
    running = cluster.read_cluster_file(settings)
    if running is not None and running.role != "one":
        where = f"{running.role} {running.node_address or ''}".strip()
        print(f"the logs of this node alone ({where}); run it on the others for theirs", file=sys.stderr)
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)  # all are open at once, one for each start of an engine
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    folder = Folder(settings.log_dir)
    try:
        wanted = wanted_by(target, a_model=folder.serves(target))

        def kept(lines: Iterable[Line]) -> Iterator[Line]:
            return (line for line in lines if line.ts >= young and (line.bad or not errors))

        found = deque(kept(folder.new_lines(wanted, young)), maxlen=last or None)
        if not found and not folder.serves(target) and not _known(settings.log_dir, wanted):
            some = ", ".join(folder.models()) or "none"
            raise OperatorError(
                f"nothing in {settings.log_dir} is of {target!r}; models that ran here: {some}",
                "give one of them, or the x-request-id of an answer of this node's gateways",
            )
        if not found and not follow:
            print(f"{target}: no such line{f' in the last {since}' if since else ''}", file=sys.stderr)
        yield from found
        while follow:
            time.sleep(POLL_S)
            yield from kept(folder.new_lines(wanted, young))
    finally:
        folder.close()


def _known(log_dir: Path, wanted: Wanted) -> bool:
    """Whether there is any line of it, however old and good."""
    everything = Folder(log_dir)
    try:
        return any(True for _ in everything.new_lines(wanted, 0.0))
    finally:
        everything.close()

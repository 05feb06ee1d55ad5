"""`steelyard top`: a live view of what is served, in a terminal. What it shows is decided in `frame.py`."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import select
import sys
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import datetime
from pathlib import Path
from typing import Annotated, TextIO

import msgspec
import typer
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from serving.cli import cluster, up
from serving.cli.frame import Event, Exposition, Frame, GpuRow, ReplicaRow, VersionRow, frame, read
from serving.cli.term import one_line_errors
from serving.errors import OperatorError, counted
from serving.fleet.endpoint import Snapshot, State
from serving.fleet.history import Change
from serving.settings import Settings, load_settings, read_private

WINDOW_S = 30.0  # of TTFT: fewer seconds hold too few requests for a tail
DIRECTORY_EVERY_S = 4.0
TIMEOUT_S = 10.0
PIPE_WIDTH = 150  # of what no terminal shows
_BAR = 10
_STATE_STYLE = {State.READY: "green", State.STARTING: "yellow", State.DRAINING: "cyan"}


def top(
    once: Annotated[bool, typer.Option("--once", help="Print one frame and end, as into a pipe.")] = False,
    interval: Annotated[float, typer.Option(min=1.0, max=60.0, help="Seconds between frames.")] = 2.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one frame as JSON.")] = False,
    state_dir: Annotated[Path | None, typer.Option(help="Folder of keys, secrets, pid and logs.")] = None,
) -> None:
    """Models, replicas, queue, tokens, GPUs, the last decisions and faults, live. Arrows, PgUp and PgDn scroll;
    `q` or Ctrl-C ends it.

    Figures come from this node's gateways (`/metrics`, with the key of the state folder), for the whole cluster; slots,
    decisions and faults from the directory.
    """
    with one_line_errors():
        settings = load_settings(state_dir=state_dir)
        with _Source(settings) as source:
            if once or as_json or not source.out.isatty():
                source.look()
                time.sleep(interval)
                source.look()
                found = source.frame()
                if as_json:
                    print(json.dumps(msgspec.to_builtins(found)), file=source.out)
                else:
                    console = Console(file=source.out, highlight=False, width=_width(source.out))
                    console.print(view(found, source.url, time.time()))
            else:
                _live(source, interval)


def _width(out: TextIO) -> int | None:
    return None if out.isatty() else PIPE_WIDTH


# -- where it comes from -------------------------------------------------------------------------------------------


class _Source:
    """The gateway's metrics and the directory's table, within bounds of how often each is asked."""

    def __init__(self, settings: Settings) -> None:
        self.url = up.address(settings)
        self.trouble = ""  # of the last look; the frame is of the one before
        self._settings = settings
        self._key = read_private(settings.api_key_file, "the API key", "name the stack's state folder: --state-dir")
        self._scrapes: deque[Exposition] = deque()
        self._table: Snapshot | None = None
        self._changes: list[Change] = []
        self._asked_at = float("-inf")
        self._stack = contextlib.ExitStack()
        self.out = sys.stdout

    def __enter__(self) -> _Source:
        self._scrapes.append(self._scraped())  # before Ray is joined, which takes seconds: is anything there?
        # Ray prints its news, such as a node's death, into whatever terminal it finds.
        noise = io.StringIO()
        self._stack.enter_context(redirect_stdout(noise))
        self._stack.enter_context(redirect_stderr(noise))
        try:
            self._stack.enter_context(cluster.joined(self._settings))
        except OperatorError:
            self._asked_at = float("inf")  # the gateways alone: a machine that is not of the cluster
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def look(self) -> None:
        """Ask again. Raises OperatorError when the gateway does not answer."""
        self._scrapes.append(self._scraped())
        while len(self._scrapes) > 2 and self._scrapes[1].at <= self._scrapes[-1].at - WINDOW_S:
            self._scrapes.popleft()
        if time.monotonic() - self._asked_at >= DIRECTORY_EVERY_S:
            self._asked_at = time.monotonic()
            from serving.fleet.directory import unpack

            with contextlib.suppress(OperatorError):  # it is away: what it said last stays
                self._table = cluster.snapshot()
                names = {e.version_id for e in self._table.endpoints} | set(self._table.versions)
                self._changes = [
                    change
                    for name in sorted(names)
                    for change in unpack(cluster.ask_directory("history", name), list[Change])
                ]

    def frame(self) -> Frame:
        kept = self._scrapes
        before = kept[-2] if len(kept) > 1 else None
        return frame(
            kept[-1], before, kept[0] if before else None, table=self._table, changes=self._changes, clock=time.time()
        )

    def _scraped(self) -> Exposition:
        asked = urllib.request.Request(f"{self.url}/metrics", headers={"authorization": f"Bearer {self._key}"})
        try:
            with urllib.request.urlopen(asked, timeout=TIMEOUT_S) as answer:
                return read(answer.read().decode(errors="replace"), time.monotonic())
        except urllib.error.HTTPError as e:
            why = "the key needs the scope `metrics`" if e.code in (401, 403) else "look at its logs"
            raise OperatorError(
                f"{self.url}/metrics answers {e.code}", f"{why} ({self._settings.api_key_file})"
            ) from None
        except OSError as e:  # a URLError is one
            reason = getattr(e, "reason", e)
            raise OperatorError(
                f"no gateway answers at {self.url}: {reason}", "start the stack with `steelyard up`"
            ) from None


# -- the terminal --------------------------------------------------------------------------------------------------


def _live(source: _Source, interval: float) -> None:
    console = Console(file=source.out, highlight=False)
    window = _Window()
    quit_it = contextlib.suppress(KeyboardInterrupt)
    with quit_it, _keys() as key_within, Live(window, console=console, screen=True, auto_refresh=False) as live:
        while True:
            trouble = ""
            try:
                source.look()
            except OperatorError as e:
                trouble = str(e)
            shown = source.frame()
            window.head, window.body = _head(shown, source.url, time.time(), trouble), _body(shown)
            live.refresh()
            until = time.monotonic() + interval  # after each scrape, however long it took: never more than one a second
            while key := key_within(until - time.monotonic()):
                if key == "quit":
                    return
                window.move(key)
                live.refresh()


class _Window:
    """As much of a frame as the terminal has room for; the rest is scrolled to, and told of in the last line."""

    def __init__(self) -> None:
        self.head: Sequence[RenderableType] = ()  # stays
        self.body: Sequence[RenderableType] = ()  # scrolls
        self._first = 0  # line of it that is shown
        self._room = 1

    def move(self, key: str) -> None:
        page = max(1, self._room - 1)
        self._first += {"up": -1, "down": 1, "page up": -page, "page down": page, "home": -_FAR, "end": _FAR}[key]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        free = options.update(height=None)
        head, body = (console.render_lines(Group(*part), free, pad=False) for part in (self.head, self.body))
        self._room = max(1, console.height - len(head))
        if len(body) > self._room:
            self._room = max(1, self._room - 1)
        self._first = max(0, min(self._first, len(body) - self._room))
        below = max(0, len(body) - self._room - self._first)
        for line in (*head, *body[self._first : self._first + self._room]):
            yield from line
            yield Segment.line()
        if self._first or below:
            told = f"{self._first} lines above, {below} below: arrows, PgUp, PgDn, Home, End; q quits"
            yield Text(told, "reverse", no_wrap=True, overflow="ellipsis")


_FAR = 1 << 30
_PRESSED = {
    **dict.fromkeys((b"q", b"Q", b""), "quit"),
    **dict.fromkeys((b"\x1b[A", b"\x1bOA", b"k"), "up"),
    **dict.fromkeys((b"\x1b[B", b"\x1bOB", b"j"), "down"),
    **dict.fromkeys((b"\x1b[5~", b"b"), "page up"),
    **dict.fromkeys((b"\x1b[6~", b" "), "page down"),
    **dict.fromkeys((b"\x1b[H", b"\x1bOH", b"\x1b[1~", b"g"), "home"),
    **dict.fromkeys((b"\x1b[F", b"\x1bOF", b"\x1b[4~", b"G"), "end"),
}
# A key as terminals send it: one character, or what an escape begins; of which the rest may not have come yet.
_KEY = re.compile(rb"(?P<begun>\x1b(?:[\[O][0-9;]*)?\Z)|\x1b[\[O][0-9;]*[A-Za-z~]|.", re.DOTALL)


@contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Gives what waits for a key that means something, for so many seconds: its meaning, or nothing. The terminal is as it
    was afterwards, whatever happens."""
    import termios
    import tty

    if not sys.stdin.isatty():
        yield _nap
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    try:
        tty.setcbreak(terminal)
        yield _Keyboard(terminal).key_within
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def _nap(seconds: float) -> str:
    time.sleep(max(0.0, seconds))
    return ""


class _Keyboard:
    """The keys typed at a terminal."""

    def __init__(self, terminal: int) -> None:
        self._terminal = terminal
        self._typed = b""

    def key_within(self, seconds: float) -> str:
        """The next one's meaning, `quit` at the end of the input; empty when none comes within the time."""
        deadline = time.monotonic() + seconds
        while True:
            while (found := _KEY.match(self._typed)) and not found["begun"]:
                self._typed = self._typed[found.end() :]
                if key := _PRESSED.get(found[0]):
                    return key
            if not select.select([self._terminal], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return ""
            more = os.read(self._terminal, 64)
            if not more:
                return "quit"
            self._typed += more


# -- the view ------------------------------------------------------------------------------------------------------


def view(shown: Frame, url: str, clock: float, trouble: str = "") -> RenderableType:
    """The frame as text. `clock` is epoch seconds; `trouble` is why the figures are old."""
    return Group(*_head(shown, url, clock, trouble), *_body(shown))


def _head(shown: Frame, url: str, clock: float, trouble: str) -> list[RenderableType]:
    at = datetime.fromtimestamp(clock).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    tokens = sum(v.tokens_per_s or 0 for v in shown.versions)
    head = Text.assemble(
        ("Steelyard ", "bold"), f"{url}  {at}  {counted(shown.gateways, 'gateway')}  {tokens:,.0f} tokens/s"
    )
    return [head, Text(trouble, "bold red")] if trouble else [head]


def _body(shown: Frame) -> list[RenderableType]:
    parts: list[RenderableType] = [Text(), _versions(shown)]
    if any(v.replicas for v in shown.versions):
        parts += [Text(), _replicas(shown)]
    if shown.gpus:
        parts += [Text(), _gpus(shown.gpus)]
    parts += [Text(), *_events("decisions", shown.decisions, shown.directory, "no change of a replica count yet")]
    parts += [Text(), *_events("faults", shown.faults, shown.directory, "none")]
    return parts


def _versions(shown: Frame) -> Table:
    window = f" ({shown.window_s:.0f} s)" if shown.window_s else ""
    table = _table(
        "model", "replicas", "running", "queue", "KV", "tokens/s", "req/s", "failed/s", f"TTFT p95{window}", text=2
    )
    for v in shown.versions:
        states = ", ".join(f"{count} {state}" for state, count in v.states.items()) or "asleep"
        bad = not v.states.get(State.READY) and (v.required or v.held > 0)
        table.add_row(
            v.id,
            Text(states, "bold red" if bad else ""),
            f"{v.running}/{v.slots}" if v.slots else f"{v.running}",
            Text(f"{v.waiting}", "yellow" if v.waiting else ""),
            _percent(v.kv_usage),
            _number(v.tokens_per_s),
            _number(v.requests_per_s),
            Text(_number(v.failed_per_s), "red" if v.failed_per_s else ""),
            _time(v.ttft_p95_s),
        )
    return table


def _replicas(shown: Frame) -> Table:
    table = _table("replica", "state", "node", "running", "waiting", "KV", "", "tokens/s", text=3)
    rows: list[tuple[VersionRow, ReplicaRow]] = [(v, r) for v in shown.versions for r in v.replicas]
    for _, r in rows:
        table.add_row(
            r.id,
            Text(r.state, _STATE_STYLE.get(State(r.state), "red") if r.state else ""),
            r.node,
            f"{r.running}/{r.slots}" if r.slots else f"{r.running}",
            f"{r.waiting}",
            _percent(r.kv_usage),
            _bar(r.kv_usage),
            _number(r.tokens_per_s),
        )
    return table


def _gpus(gpus: list[GpuRow]) -> Table:
    table = _table("GPU", "name", "held by", "SM", "", "memory", "", "power", text=3)
    for g in gpus:
        busy = _percent(g.busy) + ("" if g.exact or g.busy is None else "*")  # *: NVML's "a kernel ran"
        power = "-" if g.watts is None else f"{g.watts:.0f} W"
        where = f"{g.node} {g.index}".strip()
        name = Text(g.name) if g.up else Text("lost", "bold red")
        table.add_row(where, name, g.holder or "-", busy, _bar(g.busy), _percent(g.memory), _bar(g.memory), power)
    return table


def _events(title: str, events: list[Event], known: bool, none: str) -> Iterator[Text]:
    yield Text(title, "bold")
    if not events:
        yield Text(f"  {none}" if known else "  not known: the directory was not asked")
    for e in reversed(events):
        at = datetime.fromtimestamp(e.at).astimezone().strftime("%H:%M:%S") if e.at else "now"
        yield Text(f"  {at:<8}  {e.what}  {e.text}", no_wrap=True, overflow="ellipsis")


def _table(*columns: str, text: int) -> Table:
    """The first `text` columns are words, the others figures."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for at, name in enumerate(columns):
        table.add_column(name, justify="left" if at < text or not name else "right", no_wrap=True)
    return table


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _bar(share: float | None) -> str:
    if share is None:
        return ""
    full = min(_BAR, max(0, round(share * _BAR)))
    return "█" * full + "░" * (_BAR - full)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"

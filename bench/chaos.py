"""One fault at a time under open streams: `python -m bench.chaos` (`make chaos`), about a minute for each.

The stack as it is deployed: two gateways, four replicas over simulated engines, and clients that keep 200 answers under
way, of a fixed mix: chat, chat with tools, JSON schema, completions, two choices at once, not streamed; short ones, and long
ones of `--long-s`. `--engine vllm`: a few rows on two real engines with the model that comes with the repository. Every
answer is compared with what it had to be. For each fault a row says

    in flight    requests under way when it struck           off victim   failed, and had nothing to do with what was hit
    on victim    of them on what was hit                     silent       ended as if whole, and were not
    retried      whole, though they had to be tried again    wrong        words that were not to come
    typed        ended with an error event                   unsent       failed before a byte of the answer
    cut          by a gateway that was killed itself         detect, full seconds until out of the table; whole again

docs/failure.md says what each fault is and what is promised.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import procs, report, sides
from bench.casts import CASTS, Cast
from bench.client import ROOT
from bench.faults import ROWS
from bench.fleet import Fleet
from bench.play import Found, Stage
from bench.report import Report
from bench.scene import Watch
from serving.engine.health import Limits

OUT = ROOT / ".steelyard" / "bench" / "chaos.json"
DETECT_DEATH_S = 2.0
_COUNTS = {
    "off_victim_failed": "off_victim_failed",
    "silent_ends": "silent",
    "wrong_texts": "wrong",
    "unsent_failed": "unsent_failed",
}


def main(argv: list[str] | None = None) -> int:
    """Play the rows that the options ask for; the exit code is 1 when a bar is missed."""
    procs.exit_on_sigterm()
    options = _options(argv)
    say = report.teller(sys.stderr if options.json else sys.stdout)
    cast = CASTS[options.engine](options.streams, options.long_s, quick=options.quick)
    playable = {name: row for name, row in ROWS.items() if options.engine in row.engines}
    if absent := [name for name in options.only or [] if name not in playable]:
        print(f"error: not a row for {options.engine}: {', '.join(absent)}", file=sys.stderr)
        return 2
    names = (
        options.only or [name for name, row in playable.items() if row.quick or not options.quick]
    ) * options.repeat
    asked = {
        "engine": options.engine,
        "streams": cast.streams,
        "long_s": cast.long_s,
        "saturation_s": options.saturation_s,
        "code": report.code(),
    }
    try:
        rows = _before(options.out, names, asked) if options.resume else []
    except ValueError as error:
        print(f"error: --resume: {options.out}: {error}", file=sys.stderr)
        return 2

    def result() -> Report:
        found = Report(machine=report.machine(), asked=asked, samples=[asdict(row) for row in rows])
        judge(found, rows, len(names), cast.hang_s)
        return found

    def played(row: Found) -> None:
        rows.append(row)
        say(_sentence(row))
        report.write(result(), options.out)  # what hours have found outlives whoever ends it

    if rows:
        say(f"{len(rows)} of {len(names)} rows were played before")
    report.write(result(), options.out)
    try:
        play(cast, names, options.saturation_s, say, rows, played)
    finally:  # what was found until somebody ended it
        if not options.json:
            console = Console()
            console.width = max(console.width, 150)
            console.print(table(rows))
        code = report.finish(result(), options.out, as_json=options.json)
    return code


def play(
    cast: Cast,
    names: Sequence[str],
    saturation_s: float,
    say: Callable[[str], None],
    before: Sequence[Found],
    played: Callable[[Found], None],
) -> None:
    """All of them but those that were played `before`, on one stack."""
    turns, left = Counter(row.fault for row in before), names[len(before) :]
    if not left:
        return
    # `up` also waits for replicas that go, and they for their streams.
    ready_s = 120 + cast.start_s + cast.long_s
    settings = {"STEELYARD_GATEWAYS": str(cast.gateways), "STEELYARD_READY_TIMEOUT_S": f"{ready_s:g}"}
    with (
        tempfile.TemporaryDirectory(prefix="sy-") as folder,
        sides.stack([cast.model], cast.profile, Path(folder), **settings) as side,
    ):
        say(f"starting {cast.replicas} replicas and {cast.gateways} gateways for {len(left)} faults")
        try:
            sides.wait_ready(side, sides.START_TIMEOUT_S)
        except procs.StartFailed as error:
            say(str(error))
            return
        fleet = Fleet(side)
        with Watch(fleet, cast.model["name"]) as watch:
            stage = Stage(
                fleet,
                cast.model,
                watch,
                replicas=cast.replicas,
                gateways=cast.gateways,
                clients=cast.clients,
                leavers=cast.leavers,
                long_s=cast.long_s,
                saturation_s=saturation_s,
                start_s=cast.start_s,
                say=say,
            )
            for name in left:
                turns[name] += 1
                played(stage.play(name, ROWS[name], turns[name]))


def _before(file: Path, names: Sequence[str], asked: dict[str, Any]) -> list[Found]:
    """The rows that a run of the same code under the same load left there, none where there is no file. Raises ValueError where
    they are others."""
    if not file.exists():
        return []
    told = json.loads(file.read_text())
    if not isinstance(told, dict) or told.get("asked") != asked:
        raise ValueError("what it holds is of other code or another load; move it away, or leave out --resume")
    rows = [Found(**row) for row in told["samples"]]
    if [row.fault for row in rows] != list(names[: len(rows)]):
        raise ValueError("it holds other rows; move it away, or leave out --resume")
    return rows


def judge(result: Report, rows: Sequence[Found], asked: int, hang_s: float) -> None:
    """The bars. A row that was not played, or could not show what it should, is in trouble. `hang_s`: until one that hangs
    gets no new work; as much longer as ten of its own slow steps are longer than the usual limit."""
    troubles = asked - len(rows) + sum(bool(row.trouble) for row in rows)
    result.judge("rows_in_trouble", float(troubles), "", "==", 0.0)
    for bar, count in _COUNTS.items():
        result.judge(bar, float(sum(getattr(row, count) for row in rows)), "", "==", 0.0)
    for kind, limit in {"death": DETECT_DEATH_S, "hang": hang_s}.items():
        times = [_detected_s(row) for row in rows if ROWS[row.fault].detects == kind]
        if times:
            worst = None if None in times else max(s for s in times if s is not None)
            result.judge(f"detect_{kind}_s", worst, "s", "<", limit)
    if deaths := [max(row.deaths, default=None) for row in rows if row.fault == "poison"]:
        most = None if None in deaths else max(n for n in deaths if n is not None)
        result.judge("poison_deaths_per_fingerprint", most, "", "<=", 2.0)
    if full := [row for row in rows if row.fault == "saturation"]:
        result.judge("false_positives", sum(sum(row.verdicts.values()) for row in full), "", "==", 0.0)
        result.note("preempted", sum(row.preempted for row in full), "")


def _detected_s(row: Found) -> float | None:
    """Seconds, less those for which its engine had the right to stand still beyond the usual ones."""
    return None if row.detect_s is None else row.detect_s - max(0.0, row.stuck_after_s - Limits().stuck_s)


def table(rows: Sequence[Found]) -> Table:
    out = Table()
    out.add_column("fault", no_wrap=True)
    heads = ("in flight", "on victim", "retried", "typed", "cut", "off victim", "silent", "wrong", "unsent")
    for head in (*heads, "detect s", "full s"):
        out.add_column(head, justify="right")
    out.add_column("verdicts")
    for row in rows:
        said = (row.in_flight, row.on_victim, row.retried, row.typed, row.cut)
        bad = (row.off_victim_failed, row.silent, row.wrong, row.unsent_failed)
        times = ["" if s is None else f"{s:.1f}" for s in (row.detect_s, row.full_s)]
        said_of = row.verdicts | ({"preempted": row.preempted} if row.preempted else {})
        verdicts = ", ".join(f"{k} {v:.0f}" for k, v in said_of.items())
        counts = [*map(str, said), *(f"[red]{n}[/]" if n else "0" for n in bad)]
        out.add_row(row.fault, *counts, *times, f"[red]{row.trouble}[/]" if row.trouble else verdicts)
    return out


def _sentence(row: Found) -> str:
    spoilt = {bar: n for bar, count in _COUNTS.items() if (n := getattr(row, count))}
    return f"{row.fault}: {row.trouble or 'played'}, {row.answers} answers{f', {spoilt}' if spoilt else ''}"


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"rows: {', '.join(ROWS)}",
    )
    parser.add_argument("--only", action="append", choices=list(ROWS), metavar="ROW", help="this row; repeatable")
    parser.add_argument("--quick", action="store_true", help="three rows, fewer and shorter streams")
    parser.add_argument("--engine", choices=list(CASTS), default="simulator", help="vllm: rows that are short on a CPU")
    parser.add_argument("--streams", type=int, help="answers under way (default 200, quick 60, vllm 16)")
    parser.add_argument(
        "--long-s", type=float, help="length of long streams in seconds (default 30, quick and vllm 12)"
    )
    parser.add_argument("--saturation-s", type=float, default=30.0, help="length of that row (default 30; soak 1200)")
    parser.add_argument("--repeat", type=int, default=1, help="all rows so many times, on one stack")
    parser.add_argument("--resume", action="store_true", help="go on after the rows that --out holds already")
    parser.add_argument("--out", type=Path, default=OUT, help="where the JSON goes")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of the tables")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())

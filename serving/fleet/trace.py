"""Traffic to try a policy on: a recorded trace (CSV or JSONL) or a synthetic one. Needs numpy; imported late."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from serving.errors import OperatorError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Column names of the published traces (Azure LLM inference, Mooncake) and the plain ones of our own logs.
ARRIVAL_COLUMNS = ("arrival_s", "arrived_at", "timestamp_s", "timestamp", "time")
PROMPT_COLUMNS = ("prompt_tokens", "input_tokens", "contexttokens", "input_length")
OUTPUT_COLUMNS = ("output_tokens", "completion_tokens", "generatedtokens", "output_length")
SERVICE_COLUMNS = ("service_s", "duration_s")
COHORTS = 16  # rows that one step of a large synthetic trace is spread over; each stands for many like requests


class Trace(NamedTuple):
    """Requests in order of arrival; row i stands for `times[i]` like requests."""

    name: str
    arrival_s: Floats  # from the start of the trace
    prompt: Floats  # tokens
    output: Floats  # tokens
    service_s: Floats  # NaN where the service model is to say
    times: Ints
    span_s: float

    @property
    def requests(self) -> int:
        return int(self.times.sum())


def read(path: Path) -> Trace:
    """A trace file, by its suffix. OperatorError names the file and the line that is wrong."""
    if path.suffix not in (".csv", ".jsonl"):
        raise OperatorError(f"{path}: a trace is a .csv or a .jsonl file", "Or use --synthetic diurnal")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(_csv_rows(file, path) if path.suffix == ".csv" else _json_rows(file, path))
    except OSError as e:
        raise OperatorError(f"{path}: cannot be read: {e.strerror or e}") from None
    except UnicodeDecodeError:
        raise OperatorError(f"{path}: is not UTF-8 text") from None
    if not rows:
        raise OperatorError(f"{path}: has no requests", "One request a line, after the header of a CSV")
    table = np.array(rows, dtype=np.float64)
    table = table[np.argsort(table[:, 0], kind="stable")]
    arrival = table[:, 0] - table[0, 0]
    return Trace(
        path.name, arrival, table[:, 1], table[:, 2], table[:, 3], np.ones(len(rows), np.int64), float(arrival[-1]) + 1
    )


def _csv_rows(file: Any, path: Path) -> Iterator[tuple[float, float, float, float]]:
    reader = csv.reader(file)
    try:
        header = [name.strip() for name in next(reader, [])]
        columns = _columns(header, f"{path}:1")
        for cells in reader:
            if cells:
                yield _row(dict(zip(header, cells, strict=False)), columns, f"{path}:{reader.line_num}")
    except csv.Error as e:
        raise OperatorError(f"{path}:{reader.line_num}: is not CSV: {e}") from None


def _json_rows(file: Any, path: Path) -> Iterator[tuple[float, float, float, float]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise OperatorError(f"{path}:{number}: is not a JSON object") from None
        if not isinstance(record, dict):
            raise OperatorError(f"{path}:{number}: is not a JSON object")
        yield _row(record, _columns(list(record), f"{path}:{number}"), f"{path}:{number}")


def _columns(names: list[str], where: str) -> tuple[str, str | None, str | None, str | None]:
    found = {name.lower(): name for name in names}

    def pick(known: tuple[str, ...]) -> str | None:
        return next((found[name] for name in known if name in found), None)

    arrival, service = pick(ARRIVAL_COLUMNS), pick(SERVICE_COLUMNS)
    prompt, output = pick(PROMPT_COLUMNS), pick(OUTPUT_COLUMNS)
    if arrival is None:
        raise OperatorError(f"{where}: no time of arrival", f"Name it one of {', '.join(ARRIVAL_COLUMNS)}")
    if output is None and service is None:
        raise OperatorError(
            f"{where}: no size of the answer", f"Name it one of {', '.join(OUTPUT_COLUMNS)}, or {SERVICE_COLUMNS[0]}"
        )
    return arrival, prompt, output, service


def _row(
    record: dict[str, Any], columns: tuple[str, str | None, str | None, str | None], where: str
) -> tuple[float, float, float, float]:
    def number(name: str | None, missing: float) -> float:
        if name is None:
            return missing
        value = _value(record, name, where)
        try:
            found = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            found = math.nan
        if not (0 <= found < 1e15):
            raise OperatorError(f"{where}: {name} = {value!r} is no number of at least 0")
        return found

    arrival, prompt, output, service = columns
    return (
        _time(_value(record, arrival, where), arrival, where),
        number(prompt, 0),
        number(output, 0),
        number(service, math.nan),
    )


def _value(record: dict[str, Any], name: str, where: str) -> Any:
    if name not in record:
        raise OperatorError(f"{where}: {name} is missing")
    return record[name]


def _time(value: Any, name: str, where: str) -> float:
    """Seconds. Numbers under `timestamp` are milliseconds, as in Mooncake's traces; texts may be dates and times."""
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
        if name.lower() == "timestamp":
            seconds /= 1000
    except (TypeError, ValueError, OverflowError):
        seconds = _moment(value)
    if not math.isfinite(seconds):
        raise OperatorError(f"{where}: {name} = {value!r} is no time", "Write seconds, or 2026-11-01 18:15:46.68")
    return seconds


def _moment(value: Any) -> float:
    if not isinstance(value, str):
        return math.nan
    head, dot, fraction = value.strip().partition(".")
    if dot and fraction.isdigit():  # seven digits, as .NET writes them, are more than Python reads everywhere
        value = f"{head}.{fraction[:6]:0<6}"
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        return math.nan
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def synthetic(kind: str, *, rate: float, hours: float, seed: int) -> Trace:
    """`diurnal`: one sine a day between a fifth and the whole of `rate`. `spike`: a third of it, and the whole for ten
    minutes of each two hours. `bursty`: levels that last minutes, at random. `rate` is the peak in requests per second;
    arrivals within are independent (Poisson), sizes lognormal: prompts of 600 and answers of 180 tokens in the median."""
    span = round(hours * 3600)
    generator = np.random.default_rng(seed)
    time = np.arange(span, dtype=np.float64)
    if kind == "diurnal":
        share = 0.6 - 0.4 * np.cos(2 * np.pi * time / min(span, 86400))
    elif kind == "spike":
        share = np.where((time % 7200 >= 3000) & (time % 7200 < 3600), 1.0, 1 / 3)
    elif kind == "bursty":
        share = _levels(generator, span)
    else:
        raise OperatorError(f"--synthetic {kind} is not known", "Write diurnal, spike or bursty")
    arrivals = generator.poisson(rate * share)
    if not arrivals.any():
        raise OperatorError(f"--rate {rate:g} for {hours:g} hours makes no request", "Give more of one or the other")
    rows = np.minimum(arrivals, COHORTS)
    second = np.repeat(np.arange(span), rows)
    nth = np.arange(len(second)) - np.repeat(np.cumsum(rows) - rows, rows)
    per_row, more = arrivals[second] // rows[second], arrivals[second] % rows[second]
    count = per_row + (nth < more)
    size = len(second)
    return Trace(
        f"synthetic {kind}",
        cast(Floats, second + (nth + 0.5) / rows[second]),
        np.rint(600 * np.exp(generator.normal(0, 1.0, size))).clip(1, 30_000),
        np.rint(180 * np.exp(generator.normal(0, 0.8, size))).clip(1, 4_000),
        np.full(size, math.nan),
        count.astype(np.int64),
        float(span),
    )


def _levels(generator: np.random.Generator, span: int) -> Floats:
    """A level between a fifth and the whole, new every five minutes or so, the change spread over 20 s."""
    share = np.empty(span)
    at = 0
    while at < span:
        stay = max(30, round(generator.exponential(300)))
        share[at : at + stay] = generator.uniform(0.2, 1.0)
        at += stay
    return cast(Floats, np.convolve(np.pad(share, (10, 9), mode="edge"), np.ones(20) / 20, mode="valid"))

"""A missed bar is exit code 1, and the JSON has the shape that scripts rely on."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench.overhead import phases
from bench.plan import Plan, add
from bench.report import Op, Report, finish
from bench.stats import Estimate


def report(value: float | None, op: Op = "<=", limit: float = 2.0) -> Report:
    made = Report(machine={"cores": 2})
    made.judge("ttft_added_p50_ms_c1", value, "ms", op, limit, 1.0)
    return made


def run(made: Report, path: Path) -> tuple[int, dict[str, Any], str]:
    out = io.StringIO()
    code = finish(made, path, console=Console(file=out))
    return code, json.loads(path.read_text()), out.getvalue()


@pytest.mark.parametrize(
    ("value", "op", "limit", "code"),
    [
        (2.0, "<=", 2.0, 0),
        (2.01, "<=", 2.0, 1),
        (0.92, ">=", 0.92, 0),
        (0.91, ">=", 0.92, 1),
        (1024.0, "<", 1024.0, 1),
        (0.0, "==", 0.0, 0),
        (1.0, "==", 0.0, 1),
        (None, "<=", 2.0, 1),
    ],
)
def test_the_exit_code_is_one_when_a_bar_is_missed(
    tmp_path: Path, value: float | None, op: Op, limit: float, code: int
) -> None:
    assert run(report(value, op, limit), tmp_path / "o.json")[0] == code


def test_one_missed_bar_among_many_is_enough(tmp_path: Path) -> None:
    made = report(1.0)
    made.judge("tokens_ratio_c32", 0.5, "x", ">=", 0.92, 1.0)
    assert run(made, tmp_path / "o.json")[0] == 1


def test_a_figure_without_a_bar_never_fails(tmp_path: Path) -> None:
    made = report(1.0)
    made.note("paced_gateway_us_per_event", 1e9, "us")
    assert run(made, tmp_path / "o.json")[0] == 0


def test_the_json_has_the_promised_shape_in_a_folder_made_for_it(tmp_path: Path) -> None:
    made = Report(machine={"cores": 2}, samples=[{"phase": "c1"}])
    made.judge("x", Estimate(1.0, 0.9, 1.1, 5), "ms", "<=", 2.0, None)
    _, data, _ = run(made, tmp_path / "bench" / "overhead.json")
    assert {"machine", "bars", "samples"} <= data.keys()
    assert data["bars"] == [
        {
            "name": "x",
            "value": 1.0,
            "unit": "ms",
            "op": "<=",
            "limit": 2.0,
            "ok": True,
            "interval": [0.9, 1.1],
            "goal": None,
        }
    ]


def test_the_table_shows_names_uncut_and_the_verdict(tmp_path: Path) -> None:
    _, _, text = run(report(3.0), tmp_path / "o.json")
    assert "ttft_added_p50_ms_c1" in text
    assert "missed" in text


def test_a_quick_run_judges_counts_only() -> None:
    plan = Plan(quick=True, rounds=1, budget_s=1, only=frozenset(), weights=None, began=0.0)
    made = Report()
    add(made, "tokens_ratio_c32", 0.1, plan)
    add(made, "request_errors", 0.0, plan)
    assert [b.name for b in made.bars] == ["request_errors"]
    assert [f.name for f in made.figures] == ["tokens_ratio_c32"]


def test_a_figure_that_could_not_be_taken_is_a_missed_bar_even_in_a_quick_run() -> None:
    plan = Plan(quick=True, rounds=1, budget_s=1, only=frozenset(), weights=None, began=0.0)
    made = Report()
    add(made, "gateway_pss_mib", None, plan)
    assert not made.ok


@pytest.mark.parametrize(
    ("only", "names"),
    [
        ((), ["c1", "c8", "c32", "production"]),
        (("itl_p99_ratio_c8",), ["c8"]),
        (("gateway_us_per_event_c32", "ttft_added_p50_ms_c1"), ["c1", "c32"]),
        (("production",), ["production"]),
    ],
)
def test_only_runs_the_phases_it_needs(only: tuple[str, ...], names: list[str]) -> None:
    plan = Plan(quick=False, rounds=1, budget_s=600, only=frozenset(only), weights=None, began=0.0)
    assert [p.name for p in phases(plan, 10.0)] == names

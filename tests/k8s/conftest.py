"""One line per variant at the end: what was made of it and what it was checked against."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest


def pytest_terminal_summary(terminalreporter: Any) -> None:
    try:
        from tests.k8s import chart, schemas
    except pytest.skip.Exception:
        return
    counts: dict[str, Counter[str]] = {variant: Counter() for variant in chart.VARIANTS}
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            for variant in chart.VARIANTS:
                if "test_variants.py" in report.nodeid and variant in report.nodeid.partition("[")[2]:
                    counts[variant][outcome] += 1
    if not any(c["passed"] for c in counts.values()):
        return
    terminalreporter.section("chart variants")
    against = f"Kubernetes {chart.KUBERNETES[0]}-{chart.KUBERNETES[-1]}"
    against += ", CRDs" if chart.CRDS.is_dir() else f" (no CRDs in {chart.CRDS})"
    for variant, count in counts.items():
        found = chart.of(variant)
        kinds = ", ".join(sorted({o["kind"] for o in found}))
        custom = [o for o in found if o["kind"] not in schemas.BUILTIN]
        unchecked = sorted({o["kind"] for o in custom if not schemas.crd_file(o).is_file()})
        verdict = "FAILED" if count["failed"] else "ok"
        line = f"{variant:16} {verdict:6} {count['passed']} checks against {against}: {kinds}"
        terminalreporter.write_line(line + (f" (no schema here of: {', '.join(unchecked)})" if unchecked else ""))

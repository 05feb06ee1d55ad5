"""What the pages name exists: pages and their sections, targets of make, files, tests, settings, metrics. Commands are checked
in tests/deploy/test_quickstart.py."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = re.compile(r"```.*?```|`[^`\n]+`", re.S)
ROOMS = ("serving", "tests", "deploy", "docs", "tools", "bench", "k8s", "requirements")


def code(page: Path) -> Iterator[str]:
    """Each line of code on a page."""
    for found in CODE.findall(page.read_text()):
        yield from found.strip("`").splitlines()


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M)
    return {re.sub(r"[^a-z0-9 -]", "", h.lower()).strip().replace(" ", "-") for h in heads}


pytestmark = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)


def test_links_lead_somewhere(page: Path) -> None:
    for to, section in re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]*))?\)", page.read_text()):
        there = (page.parent / to).resolve() if to else page
        assert there.exists(), to
        assert not section or section in anchors(there), f"{to}#{section}"
    for name in re.findall(r"\bdocs/[a-z-]+\.md", page.read_text()):
        assert (ROOT / name).exists(), name


def test_targets_of_make_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for line in code(page):
        for name in re.findall(r"\bmake ([a-z][a-z-]*)", line):
            assert name in targets, line


def test_files_and_tests_exist(page: Path) -> None:
    for line in code(page):
        for path, test in re.findall(rf"(?<![\w./-])((?:{'|'.join(ROOMS)})/[\w./-]*[\w/])(?:::(\w+))?", line):
            file = ROOT / path
            assert file.exists() or list(file.parent.glob(f"{file.name}.*")), path
            assert not test or f"def {test}(" in file.read_text(), f"{path}::{test}"


def test_settings_exist(page: Path) -> None:
    known = {f"STEELYARD_{name.upper()}" for name in Settings.model_fields}
    for name in re.findall(r"\bSTEELYARD_[A-Z_]+\b", page.read_text()):
        assert name in known, name


def test_metrics_exist(page: Path) -> None:
    said = (ROOT / "serving/telemetry/metrics.py").read_text() + (ROOT / "serving/telemetry/gpu.py").read_text()
    rules = "".join(p.read_text() for p in (ROOT / "deploy/observability").glob("*.yml"))
    for name in re.findall(r"\bsteelyard_[a-z_]+[a-z]\b", page.read_text()):
        base = re.sub(r"_(?:total|bucket|sum|count)$", "", name)
        assert base in said or name in rules or name.startswith("steelyard_process_"), name  # prometheus_client's own

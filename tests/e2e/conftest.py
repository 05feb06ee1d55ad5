from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import otlp
from tests.otlp import Collector
from tests.stack import ROOT, Stack


@pytest.fixture(scope="package")
def collector() -> Iterator[Collector]:
    with otlp.collector() as found:
        yield found


@pytest.fixture(scope="package")  # gone before other packages run
def real(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Stack]:
    """What `make serve` starts: the shipped catalog on real vLLM engines. Every request is traced."""
    running = Stack(tmp_path_factory.mktemp("real") / "state", profile="cpu", models=ROOT / "models")
    running.env |= {"STEELYARD_OTLP_ENDPOINT": collector.url, "STEELYARD_TRACE_RATIO": "1"}
    running.env["OTEL_BSP_SCHEDULE_DELAY"] = "300"  # ms; engines wait 5 s by default
    try:
        yield running.start()
    finally:
        running.stop()


@pytest.fixture(scope="session")
def corpus() -> list[dict[str, str]]:
    lines = (Path(ROOT) / "models" / "tiny" / "corpus.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.strip()]

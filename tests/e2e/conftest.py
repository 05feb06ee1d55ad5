from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stack import ROOT, Stack, stack


@pytest.fixture(scope="package")  # gone before other packages run
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """What `make serve` starts: the shipped catalog on real vLLM engines."""
    with stack(tmp_path_factory.mktemp("real") / "state", profile="cpu", models=ROOT / "models") as running:
        yield running


@pytest.fixture(scope="session")
def corpus() -> list[dict[str, str]]:
    lines = (Path(ROOT) / "models" / "tiny" / "corpus.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.strip()]

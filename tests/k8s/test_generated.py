"""What is generated is fresh, and the checks of this folder can fail."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from tests.k8s import chart, schemas
from tests.k8s.chart import CHART
from tools import chart as generator


def test_schema_readme_and_facts_are_fresh() -> None:
    made = generator.texts()
    assert {p.name for p in (CHART / "files" / "observability").rglob("*.*")} == {
        Path(name).name for name in made if "observability" in name
    }
    stale = [name for name, text in made.items() if (CHART / name).read_text() != text]
    assert not stale, "run `make chart-docs`"


def test_every_value_is_described_and_no_unknown_one_is_taken() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)

    def walk(node: dict[str, object], path: str) -> None:
        assert node.get("additionalProperties") is False, path
        for name, part in node["properties"].items():  # type: ignore[attr-defined]
            if part.get("properties"):
                walk(part, f"{path}.{name}")
            else:
                assert part.get("description"), f"{path}.{name}"

    walk(schema, "")


def test_a_field_that_the_api_server_would_drop_is_found() -> None:
    service = chart.rayservice(chart.of("one-h100"))
    service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["servicAccountName"] = "typo"
    with pytest.raises(AssertionError, match="servicAccountName"):
        schemas.check_custom(service)
    (config,) = chart.kind(chart.of("multi-model"), "ScrapeConfig")
    config["spec"]["httpSDConfigs"][0]["bearerToken"] = "typo"
    with pytest.raises(AssertionError, match="bearerToken"):
        schemas.check_custom(config)
    secret = chart.kind(chart.of("one-h100"), "Secret")[0] | {"stringdata": {}}
    with pytest.raises(jsonschema.ValidationError, match="stringdata"):
        schemas.check_builtin(secret)

"""Rules, alerts and dashboards: valid, whole, and asking for series that there are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from serving.engine.simulator.kv import KvCache
from serving.engine.simulator.metrics import Metrics
from serving.telemetry.metrics import DirectoryMetrics, GatewayMetrics
from tools import dashboards

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "observability"
RULES = {name: yaml.safe_load((FOLDER / f"{name}.yml").read_text())["groups"] for name in ("recording", "alerts")}
ALERTS = {r["alert"]: r for group in RULES["alerts"] for r in group["rules"]}
RECORDED = {r["record"] for group in RULES["recording"] for r in group["rules"]}
_METRIC = re.compile(r"(?<![\w\"$:])((?:steelyard_|vllm:|process_|model:|model_version:)[\w:]+)")


def promtool(*args: str | Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian's package prometheus has it)")
    done = subprocess.run(["promtool", *map(str, args)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def series() -> set[str]:
    """Every series of ours: of gateway and directory as they declare them, of engines as the simulator has them, of GPUs
    as docs/metrics.md lists them."""
    found: set[str] = set()
    registries = [CollectorRegistry() for _ in range(3)]
    gateway = GatewayMetrics(registries[0])
    gateway.of("m", "v")
    directory = DirectoryMetrics(registries[1])
    directory.seen("m", "v")
    engine = Metrics(registries[2], "m", 2048, KvCache(4096, 16))
    engine.watch(running=lambda: 0, waiting=lambda: 0, kv_usage=lambda: 0)
    for registry in registries:
        for family in registry.collect():
            suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
            found |= {family.name + suffix for suffix in suffixes}
    table = re.findall(r"^\| (`.+?) \|", (ROOT / "docs" / "metrics.md").read_text(), re.M)
    for cell in table:
        names = re.findall(r"`([\w:]+)", cell)
        for name in names:
            # `_memory_total_bytes` after `steelyard_gpu_memory_used_bytes` shares its beginning.
            found.add(name if name.startswith("steelyard_") else "steelyard_gpu" + name)
    return found | RECORDED | {"process_resident_memory_bytes", "process_cpu_seconds_total"}


def asked(text: str) -> set[str]:
    """Names of series in an expression."""
    return set(_METRIC.findall(re.sub(r'"[^"]*"', '""', text)))


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [p for p in dashboard["panels"] if p["type"] != "row"]


LOADED = {p.stem: json.loads(p.read_text()) for p in sorted((FOLDER / "dashboards").glob("*.json"))}


def test_prometheus_takes_the_configuration(tmp_path: Path) -> None:
    for file in FOLDER.glob("*.yml"):
        shutil.copy(file, tmp_path)
    (tmp_path / "steelyard-key").write_text("sk-steelyard-x\n")
    promtool("check", "config", tmp_path / "prometheus.yml")


def test_each_alert_fires_and_does_not_fire() -> None:
    tests = FOLDER / "tests" / "alerts_test.yml"
    promtool("test", "rules", tests)
    text = tests.read_text()
    assert [name for name in ALERTS if f'alertname="{name}"' not in text] == []


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_how_bad_what_and_what_to_do(name: str) -> None:
    alert = ALERTS[name]
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert alert["annotations"]["summary"]
    page, _, anchor = alert["annotations"]["runbook_url"].partition("#")
    headings = re.findall(r"^##+ (.+)$", (ROOT / page).read_text(), re.M)
    assert name in headings and anchor == name.lower()
    assert name in (ROOT / "docs" / "observability.md").read_text(), "the table of alerts lacks it"


def test_runbooks_are_of_alerts_that_there_are() -> None:
    headings = re.findall(r"^## (Steelyard\w+)$", (ROOT / "docs" / "runbooks.md").read_text(), re.M)
    assert sorted(headings) == sorted(ALERTS)


def test_rules_ask_for_series_that_there_are() -> None:
    known = series()
    for group in (*RULES["recording"], *RULES["alerts"]):
        for rule in group["rules"]:
            assert asked(rule["expr"]) <= known, rule
            selected = re.findall(
                r"(?<![\w:])(?:(?:steelyard_|vllm:|model\w*:)[\w:]+|up)(?![\w:])(\{[^}]*\})?", rule["expr"]
            )
            assert selected and all('job="steelyard"' in s for s in selected), f"{rule}: a selector without the job"
            grouped = re.findall(r"\b(?:by|on) \(([^)]*)\)", rule["expr"])
            assert all(g.startswith("job") for g in grouped), f"{rule}: two clusters in one Prometheus become one"


def test_dashboards_are_fresh() -> None:
    found = {p.name: p.read_text() for p in (FOLDER / "dashboards").iterdir()}
    assert found == dashboards.texts(), "run `make dashboards`"


@pytest.mark.parametrize("name", LOADED)
def test_a_dashboard_is_one_that_grafana_takes(name: str) -> None:
    dashboard = LOADED[name]
    assert (dashboard["uid"], dashboard["schemaVersion"]) == (f"steelyard-{name}", dashboards.SCHEMA_VERSION)
    assert dashboard["templating"]["list"][0]["type"] == "datasource"
    ids = [p["id"] for p in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24, f"{panel['title']} lies on another"
        taken |= cells
    variables = {v["name"] for v in dashboard["templating"]["list"]}
    for panel in panels(dashboard):
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"
        assert len({t["refId"] for t in panel["targets"]}) == len(panel["targets"]) > 0
        for target in panel["targets"]:
            used = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval"}
            assert used <= variables, f"{panel['title']} uses {used - variables}"


@pytest.mark.parametrize("name", LOADED)
def test_dashboards_ask_for_series_that_there_are(name: str) -> None:
    known = series() | {"up", "ALERTS"}
    for panel in panels(LOADED[name]):
        for target in panel["targets"]:
            assert asked(target["expr"]) <= known, panel["title"]
            selected = re.findall(r"(?:steelyard_|vllm:|model\w*:|ALERTS)[\w:]*(\{[^}]*\})?", target["expr"])
            assert all('job="$job"' in s for s in selected), f"{panel['title']}: a selector without the job"


def test_every_series_that_processes_have_is_in_the_documentation() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text()
    registry = CollectorRegistry()
    gateway = GatewayMetrics(registry)
    gateway.of("m", "v")
    exposed = gateway.text() + DirectoryMetrics(CollectorRegistry()).text()
    names = {family.name for family in text_string_to_metric_families(exposed)}
    missing = [
        n
        for n in names
        if n not in text
        and not n.startswith(("steelyard_process_", "steelyard_requests_"))
        and n + "_total" not in text
    ]
    assert missing == []

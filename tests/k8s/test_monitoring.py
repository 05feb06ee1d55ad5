"""What Prometheus is told, which key it gets, and that nothing of it is there where monitoring is off."""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from serving.gateway import routes
from serving.gateway.keys import Key, KeyRing
from tests.k8s import chart
from tests.k8s.apiserver import Cluster, cluster
from tests.k8s.chart import NAMESPACE, RELEASE, helm
from tests.k8s.test_upgrade import decoded

ON = {"monitoring.enabled": True}
MONITORED = chart.changed("one-h100", ON)
OFF = chart.values("one-h100")


def scrape(found: list[chart.Object]) -> chart.Object:
    (config,) = chart.kind(found, "ScrapeConfig")
    return config


def opened(secret: dict[str, str], folder: Path, entry: str = "metrics-key") -> Key:
    """The key of the token under `entry`, as a gateway with that keys file finds it."""
    file = folder / "keys.json"
    file.write_text(secret["keys.json"])
    file.chmod(0o600)
    return KeyRing(file).check(secret[entry], time.time())


def test_without_monitoring_nothing_tells_of_it() -> None:
    found = chart.of("no-monitoring")
    assert "monitoring.coreos.com" not in {o["apiVersion"].split("/")[0] for o in found}
    told = yaml.safe_dump_all([*found, decoded(found)]).lower()
    assert not [word for word in ("monitoring", "prometheus", "metrics-key", "scrape") if word in told]
    assert "Prometheus" not in chart.render(chart.values("no-monitoring"))["steelyard/templates/NOTES.txt"]


@pytest.mark.parametrize("variant", ["multi-model", "h200-tp8"])
def test_prometheus_asks_the_service_for_the_processes(variant: str) -> None:
    """The Service that KubeRay makes, at its port, and a path that a gateway answers to the scope `metrics`."""
    found = chart.of(variant)
    service = chart.rayservice(found)["spec"]["serveService"]
    (discovery,) = scrape(found)["spec"]["httpSDConfigs"]
    url = urlsplit(discovery["url"])
    assert url.hostname == f"{service['metadata']['name']}.{NAMESPACE}.svc"
    assert url.port == service["spec"]["ports"][0]["port"], (
        "targets are named by the Host header: the port stands in it"
    )
    assert routes.OWN[url.path] == "metrics"


def test_the_operator_finds_it_by_the_labels_given() -> None:
    config = scrape(chart.of("multi-model"))
    assert config["metadata"]["labels"]["release"] == "kube-prometheus-stack"
    assert config["metadata"]["labels"]["app.kubernetes.io/instance"] == RELEASE
    assert config["spec"]["scrapeInterval"] == config["spec"]["httpSDConfigs"][0]["refreshInterval"] == "15s"


def test_rules_are_those_of_the_repository_for_this_releases_job() -> None:
    found = chart.of("multi-model")
    (rule,) = chart.kind(found, "PrometheusRule")
    assert rule["metadata"]["labels"]["release"] == "kube-prometheus-stack"
    job = scrape(found)["spec"]["jobName"]
    assert job == f"{chart.NAMESPACE}-steelyard", "another namespace's release of the same name is another job"
    wanted = []
    for name in ("recording", "alerts"):
        text = (chart.ROOT / "deploy" / "observability" / f"{name}.yml").read_text()
        wanted += yaml.safe_load(text.replace('job="steelyard"', f'job="{job}"'))["groups"]
    assert rule["spec"]["groups"] == wanted


def test_rules_of_a_release_of_another_name_look_for_its_job() -> None:
    given = chart.changed("one-h100", ON | {"monitoring.rules": True})
    rendered = chart.render(given, name="llm")
    (rule,) = yaml.safe_load_all(rendered["steelyard/templates/prometheusrule.yaml"])
    (config,) = yaml.safe_load_all(rendered["steelyard/templates/scrapeconfig.yaml"])
    job = config["spec"]["jobName"]
    asked = [r["expr"] for group in rule["spec"]["groups"] for r in group["rules"]]
    assert job == f"{chart.NAMESPACE}-llm-steelyard" and not any('job="steelyard"' in expr for expr in asked)
    assert sum(f'job="{job}"' in expr for expr in asked) > 20


def test_dashboards_are_those_of_the_repository() -> None:
    maps = chart.kind(chart.of("multi-model"), "ConfigMap")
    files = {p.name: json.loads(p.read_text()) for p in (chart.ROOT / "deploy/observability/dashboards").glob("*.json")}
    assert {name: json.loads(text) for m in maps for name, text in m["data"].items()} == files
    for m in maps:
        assert m["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert m["metadata"]["annotations"] == {"grafana_folder": "LLM"}


@pytest.mark.parametrize(
    ("change", "name", "key", "made"),
    [
        ({}, "steelyard", "metrics-key", True),
        ({"secrets.existingSecret": "mine"}, "mine", "metrics-key", False),
        ({"monitoring.existingSecret": "prom", "monitoring.key": "token"}, "prom", "token", False),
        ({"secrets.existingSecret": "mine", "monitoring.existingSecret": "prom"}, "prom", "metrics-key", False),
    ],
    ids=["made", "existing", "of its own", "both"],
)
def test_the_key_is_a_reference(change: dict[str, Any], name: str, key: str, made: bool) -> None:
    """For the list and for the scrapes; no token in the object, and none made where one is given."""
    found = chart.objects(chart.changed("one-h100", ON | change))
    spec = scrape(found)["spec"]
    for part in (spec, *spec["httpSDConfigs"]):
        assert part["authorization"] == {"credentials": {"name": name, "key": key}}
    assert "sk-steelyard" not in str(spec)
    assert any(key in secret["data"] for secret in chart.kind(found, "Secret")) is made


def test_the_key_made_for_prometheus_opens_metrics_alone(tmp_path: Path) -> None:
    secret = decoded(chart.objects(MONITORED))
    assert opened(secret, tmp_path).scopes == {"metrics"}
    assert "admin" in opened(secret, tmp_path, "api-key").scopes, "the first key is there as ever"


def test_no_pod_sees_the_token() -> None:
    for where, pod in chart.pods(chart.objects(MONITORED)):
        assert "metrics-key" not in str(pod), where
        for volume in pod["spec"].get("volumes", []):
            assert "secret" not in volume or volume["secret"]["items"], f"{where}: the whole Secret would be mounted"


def test_prometheus_is_let_in_where_clients_are_named() -> None:
    wanted = {
        "ports": [{"port": 8000, "protocol": "TCP"}],
        "from": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
    }
    head, worker = chart.kind(chart.of("h200-tp8"), "NetworkPolicy")
    assert wanted in worker["spec"]["ingress"] and wanted not in head["spec"]["ingress"], "the Service spares the head"
    serving = chart.objects(chart.changed("h200-tp8", {"head.servesTraffic": True}))
    assert all(wanted in p["spec"]["ingress"] for p in chart.kind(serving, "NetworkPolicy"))


def test_where_everyone_is_let_in_prometheus_needs_no_rule() -> None:
    _, worker = chart.kind(chart.of("multi-model"), "NetworkPolicy")
    _, gateways = worker["spec"]["ingress"]
    assert "from" not in gateways


# -- over upgrades -------------------------------------------------------------------------------------------------


def installed(there: Cluster, values: dict[str, Any]) -> dict[str, str]:
    """The release's Secret after an install or upgrade with `values`, which is then in the cluster."""
    found = there.helm(values)
    for document in found:
        there.put(document)
    return decoded(found)


def edited(there: Cluster, **change: Any) -> None:
    """Change the record of Prometheus's key in the cluster's keys.json, as somebody's `kubectl patch` would."""
    (secret,) = [o for p, o in there.objects.items() if p.endswith("/secrets/steelyard")]
    keys = json.loads(base64.b64decode(secret["data"]["keys.json"]))
    next(k for k in reversed(keys["keys"]) if k["name"] == "prometheus").update(change)
    secret["data"]["keys.json"] = base64.b64encode(json.dumps(keys).encode()).decode()


def test_switched_on_later_it_adds_one_key_and_changes_no_other(tmp_path: Path) -> None:
    with cluster() as there:
        before = installed(there, OFF)
        assert "metrics-key" not in before
        after = installed(there, MONITORED)
        assert opened(after, tmp_path).scopes == {"metrics"}
        old, new = (json.loads(s["keys.json"])["keys"] for s in (before, after))
        assert new[:-1] == old and new[-1]["name"] == "prometheus"
        assert {k: after[k] for k in ("cluster-secret", "api-key")} == {
            k: before[k] for k in ("cluster-secret", "api-key")
        }
        assert installed(there, MONITORED) == after, "made once"
        assert installed(there, OFF) == after, "what is in the cluster is kept"


@pytest.mark.parametrize(
    "change",
    [
        {"revoked_at": "2026-11-01T00:00:00Z"},
        {"expires_at": "2026-11-01T00:00:00Z"},
        {"scopes": ["admin", "metrics"]},
        {"sha256": "0" * 64},
    ],
    ids=["revoked", "expired", "opens more", "unknown"],
)
def test_a_key_that_cannot_serve_gets_a_successor(change: dict[str, Any], tmp_path: Path) -> None:
    with cluster() as there:
        before = installed(there, MONITORED)
        edited(there, **change)
        after = installed(there, MONITORED)
        assert after["metrics-key"] != before["metrics-key"]
        assert opened(after, tmp_path).scopes == {"metrics"}
        assert len(json.loads(after["keys.json"])["keys"]) == 3, "the old record stays, as that of any revoked key"


def test_a_key_that_expires_later_is_kept() -> None:
    with cluster() as there:
        before = installed(there, MONITORED)
        edited(there, expires_at="2999-01-01T00:00:00Z")
        assert installed(there, MONITORED)["metrics-key"] == before["metrics-key"]


def test_options_of_other_keys_survive_the_addition(tmp_path: Path) -> None:
    """Helm's templates read numbers as floats: the keys file wants whole ones."""
    with cluster() as there:
        installed(there, MONITORED)
        edited(there, tokens_per_minute=10**12, weight=7, scopes=["infer:*"])
        after = installed(there, MONITORED)
        (tmp_path / "keys.json").write_text(after["keys.json"])
        changed = json.loads(after["keys.json"])["keys"][1]
        assert (changed["tokens_per_minute"], changed["weight"]) == (10**12, 7)
        assert opened(after, tmp_path).scopes == {"metrics"}


def test_a_damaged_keys_file_stops_the_upgrade() -> None:
    with cluster() as there:
        data = {"cluster-secret": "eA==", "keys.json": base64.b64encode(b"{").decode()}
        there.put({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "steelyard"}, "data": data})
        with pytest.raises(helm.HelmError, match=r"keys\.json of the Secret steelyard is damaged"):
            there.helm(MONITORED)

"""What an upgrade keeps, and what it must be told twice. Helm talks to an API server of ours, so `lookup` finds something."""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.gateway.keys import KeyRing
from tests.k8s import chart
from tests.k8s.apiserver import Cluster, cluster
from tests.k8s.chart import helm

BASE = chart.values("one-h100")
SHAPE = "steelyard/cluster-shape"


@pytest.fixture(scope="module")
def installed() -> Iterator[Cluster]:
    """The one-h100 variant is there."""
    with cluster() as there:
        for document in there.helm(BASE):
            there.put(document)
        yield there


def decoded(found: list[chart.Object]) -> dict[str, str]:
    (secret,) = chart.kind(found, "Secret")
    return {key: base64.b64decode(value).decode() for key, value in secret["data"].items()}


def test_the_first_key_opens_a_gateway(tmp_path: Path) -> None:
    """The Secret made by the templates is a keys file as the gateways read it."""
    made = decoded(chart.of("one-h100"))
    file = tmp_path / "keys.json"
    file.write_text(made["keys.json"])
    os.chmod(file, 0o600)
    key = KeyRing(file).check(made["api-key"], time.time())
    assert key.allows("admin") and key.allows("infer:llama-8b") and key.allows("metrics")
    assert len(made["cluster-secret"]) >= 43 and made["api-key"] not in made["keys.json"]


def test_two_installs_share_no_secret() -> None:
    first, second = decoded(chart.objects(BASE)), decoded(chart.objects(BASE))
    assert not set(first.values()) & set(second.values())


def test_an_upgrade_keeps_every_key_that_was_made_since(installed: Cluster) -> None:
    (path,) = [p for p in installed.objects if p.endswith("/secrets/steelyard")]
    secret = installed.objects[path]
    keys = json.loads(base64.b64decode(secret["data"]["keys.json"]))
    keys["keys"].append({**keys["keys"][0], "id": "00000000", "name": "later"})
    secret["data"]["keys.json"] = base64.b64encode(json.dumps(keys).encode()).decode()
    (after,) = chart.kind(installed.helm(BASE), "Secret")
    assert after["data"] == secret["data"]


def test_a_broken_secret_stops_the_upgrade() -> None:
    with cluster() as there:
        there.put(
            {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "steelyard"}, "data": {"api-key": "eA=="}}
        )
        with pytest.raises(helm.HelmError, match=r"is there without cluster-secret and keys\.json"):
            there.helm(BASE)


IN_PLACE: dict[str, dict[str, Any]] = {
    "nothing": {},
    "a model's arguments": {"models.0.versions.0.engine.args": {"max-model-len": 8192}},
    "more pods": {"workers.0.replicas": 3},
    "a group at the end": {"workers.1": {"name": "h200", "replicas": 1, "accelerator": "H200", "gpus": 8}},
    "tolerations": {"workers.0.tolerations": [{"key": "x", "operator": "Exists"}]},
    "the Service": {"service": {"type": "LoadBalancer"}},
}

NEW_CLUSTER: dict[str, dict[str, Any]] = {
    "the image": {"image.tag": "0.2.0-cuda"},
    "memory": {"workers.0.resources": {"requests": {"cpu": "8"}, "limits": {"memory": "128Gi"}}},
    "GPUs of a pod": {"workers.0.gpus": 2},
    "a group before": {
        "workers": [{"name": "h200", "replicas": 1, "accelerator": "H200", "gpus": 8}, *BASE["workers"]],
    },
    "another group": {"workers.0.name": "other"},
    "environment": {"extraEnv": [{"name": "NCCL_DEBUG", "value": "INFO"}]},
}


@pytest.mark.parametrize("what", IN_PLACE)
def test_changes_in_place_need_no_word(installed: Cluster, what: str) -> None:
    assert chart.rayservice(installed.helm(chart.changed("one-h100", IN_PLACE[what])))


@pytest.mark.parametrize("what", NEW_CLUSTER)
def test_a_second_cluster_must_be_acknowledged(installed: Cluster, what: str) -> None:
    """The refusal names the GPUs it takes and the shape to accept; with that shape the same upgrade goes through."""
    given = chart.changed("one-h100", NEW_CLUSTER[what])
    with pytest.raises(
        helm.HelmError, match=r"second cluster .* needs \d+ more GPUs .*acknowledgedShape=[0-9a-f]{12}"
    ) as e:
        installed.helm(given)
    shape = str(e.value).split("acknowledgedShape=")[1][:12]
    service = chart.rayservice(installed.helm({**given, "upgrade": {"acknowledgedShape": shape}}))
    assert service["metadata"]["annotations"][SHAPE] == shape


def test_without_a_second_cluster_the_change_waits_and_says_so(installed: Cluster) -> None:
    given = chart.changed("one-h100", {"image.tag": "0.2.0-cuda", "upgrade.strategy": "None"})
    with pytest.raises(helm.HelmError, match=r"does not reach the running cluster .* then delete the RayCluster"):
        installed.helm(given)


def test_an_acknowledged_shape_holds_for_that_shape_alone() -> None:
    """GitOps renders without a cluster: the pinned shape is what stands between a commit and a second cluster."""
    shape = chart.rayservice(chart.of("one-h100"))["metadata"]["annotations"][SHAPE]
    pinned = chart.changed("one-h100", {"upgrade.acknowledgedShape": shape})
    assert chart.objects(pinned)
    with pytest.raises(helm.HelmError, match=f"upgrade.acknowledgedShape is {shape}"):
        chart.objects({**pinned, "drainSeconds": 61})


def test_the_shape_ignores_what_kuberay_ignores() -> None:
    """Pinned to KubeRay's GenerateHashWithoutReplicasAndWorkersToDelete: replicas, tolerations and the Serve config."""

    def shape(change: dict[str, Any]) -> str:
        service = chart.rayservice(chart.objects(chart.changed("one-h100", change)))
        return str(service["metadata"]["annotations"][SHAPE])

    same = shape({})
    for what in ("more pods", "tolerations", "a model's arguments", "the Service"):
        assert shape(IN_PLACE[what]) == same, what
    assert shape(IN_PLACE["a group at the end"]) != same

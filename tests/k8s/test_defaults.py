"""What the chart does not do unless asked, and what it does unasked."""

from __future__ import annotations

from tests.k8s import chart

SMALLEST = "one-h100"


def test_what_is_off_by_default_is_absent() -> None:
    found = chart.of(SMALLEST)
    assert not chart.kind(found, "Ingress") and not chart.kind(found, "HTTPRoute")
    assert not chart.kind(found, "PrometheusRule") and not chart.kind(found, "ConfigMap")
    assert not chart.kind(found, "ScrapeConfig"), "the operator's kinds may be missing, and then the install would fail"
    assert not chart.kind(found, "Service"), "KubeRay makes it, so that it follows the serving cluster"
    assert not chart.kind(found, "Role") and not chart.kind(found, "ClusterRole"), "nothing needs a right"
    service = chart.rayservice(found)
    cluster = service["spec"]["rayClusterConfig"]
    assert "gcsFaultToleranceOptions" not in cluster and "enableInTreeAutoscaling" not in cluster
    assert service["spec"]["excludeHeadPodFromServeSvc"] is True
    for _, pod in chart.pods(found):
        assert "initContainers" not in pod["spec"]


def test_what_is_on_by_default_goes_when_switched_off() -> None:
    off = {
        "networkPolicy.enabled": False,
        "podDisruptionBudget.enabled": False,
        "secrets.existingSecret": "mine",
        "serviceAccount.create": False,
        "serviceAccount.name": "mine",
    }
    kinds = {o["kind"] for o in chart.objects(chart.changed(SMALLEST, off))}
    assert kinds == {"RayService", "Pod"}


def test_ray_asks_for_its_token_and_the_head_carries_no_engine() -> None:
    cluster = chart.rayservice(chart.of(SMALLEST))["spec"]["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-gpus"] == "0"


def test_every_node_gets_its_gateways_the_head_too() -> None:
    found = chart.of("h200-tp8")
    (gateway,) = chart.serve_config(found)["applications"][0]["deployments"]
    assert (gateway["num_replicas"], gateway["max_replicas_per_node"]) == (4 * 3, 4)


def test_accelerators_select_their_nodes() -> None:
    groups = chart.rayservice(chart.of("multi-model"))["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    h100, h200 = (g["template"]["spec"] for g in groups)
    assert h100["nodeSelector"] == {
        "nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3",
        "topology.kubernetes.io/region": "eu",
    }
    assert h200["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H200"}
    for spec in (h100, h200):
        assert spec["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
        assert spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert groups[0]["labels"] == {"region": "eu"}, "placement.labels of models meet Ray's node labels"


def test_engine_ports_open_to_this_release_alone() -> None:
    for policy in chart.kind(chart.of("h200-tp8"), "NetworkPolicy"):
        everything, *limited = policy["spec"]["ingress"]
        (peer,) = everything["from"]
        assert peer["podSelector"]["matchLabels"]["app.kubernetes.io/instance"] == chart.RELEASE
        assert "namespaceSelector" not in peer
        for rule in limited:
            assert {p["port"] for p in rule["ports"]} <= {8000, 8265}
        assert set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}


def test_only_the_operator_reaches_the_dashboard() -> None:
    head, worker = chart.kind(chart.of("h200-tp8"), "NetworkPolicy")
    (rule,) = [r for r in head["spec"]["ingress"] if any(p["port"] == 8265 for p in r.get("ports", []))]
    assert rule["from"] == [
        {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}}
    ]
    assert "8265" not in str(worker)


def test_named_clients_leave_the_helm_test_a_way_in() -> None:
    _, worker = chart.kind(chart.of("h200-tp8"), "NetworkPolicy")
    gateways = worker["spec"]["ingress"][1]
    assert gateways["ports"] == [{"port": 8000, "protocol": "TCP"}]
    assert {"test"} == {
        p["podSelector"]["matchLabels"]["app.kubernetes.io/component"] for p in gateways["from"] if "podSelector" in p
    }


def test_the_copying_container_alone_holds_the_store_s_credentials() -> None:
    for where, pod in chart.pods(chart.of("h200-tp8")):
        for container in pod["spec"]["containers"]:
            assert "envFrom" not in container, where
    *_, worker = [pod for where, pod in chart.pods(chart.of("h200-tp8")) if where == "h200"]
    (fetch,) = worker["spec"]["initContainers"]
    assert fetch["envFrom"] == [{"secretRef": {"name": "weights-store"}}]
    mounts = {m["name"]: m for m in worker["spec"]["containers"][0]["volumeMounts"]}
    assert mounts["weights"]["readOnly"] is True, "an engine never writes weights"


def test_traces_go_nowhere_unless_asked_and_the_headers_come_as_a_file() -> None:
    assert "OTLP" not in str(chart.of(SMALLEST))
    for where, pod in chart.pods(chart.of("h200-tp8")):
        if where == "steelyard-test":
            continue
        (ray,) = pod["spec"]["containers"]
        told = {e["name"]: e["value"] for e in ray["env"] if "OTLP" in e["name"] or "TRACE" in e["name"]}
        assert told == {
            "STEELYARD_OTLP_ENDPOINT": "https://otel.example:4318",
            "STEELYARD_TRACE_RATIO": "0.01",
            "STEELYARD_TRACE_SERVICE": "steelyard",
            "STEELYARD_OTLP_HEADERS_FILE": "/etc/steelyard/tracing/headers",
        }
        (mount,) = [m for m in ray["volumeMounts"] if m["name"] == "tracing"]
        assert mount == {"name": "tracing", "mountPath": "/etc/steelyard/tracing", "readOnly": True}
        (volume,) = [v for v in pod["spec"]["volumes"] if v["name"] == "tracing"]
        assert volume["secret"] == {
            "secretName": "otel", "defaultMode": 0o400, "items": [{"key": "headers", "path": "headers"}]
        }  # fmt: skip


def test_labels_that_select_do_not_follow_the_chart_s_version() -> None:
    """KubeRay hashes the pod template: a version in it would build a second cluster at every chart release."""
    for where, pod in chart.pods(chart.of(SMALLEST)):
        if where != "steelyard-test":
            assert not {"helm.sh/chart", "app.kubernetes.io/version"} & set(pod["metadata"]["labels"]), where

"""Every ci/ variant: linted, rendered, valid for each Kubernetes version, restricted, and serving what `render` says."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from serving.catalog import store
from serving.fleet import manifest
from tests.k8s import chart, schemas
from tests.k8s.chart import CHART, NAMESPACE, ROOT, VARIANTS, helm
from tools.chart import CACHE_DIR, RECIPES_DIR

MONITORED = [v for v in VARIANTS if chart.values(v).get("monitoring", {}).get("enabled")]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("version", ["v1.30.0", "v1.34.0"])
def test_lints_without_a_warning(variant: str, version: str) -> None:
    report = helm.lint(CHART, chart.values(variant), strict=True, namespace=NAMESPACE, kube_version=version)
    assert [m for m in report["messages"] if m["severity"] > 1] == [] == report["errors"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_objects_are_valid_for_every_kubernetes(variant: str) -> None:
    found = chart.of(variant)
    for document in found:
        if document["kind"] in schemas.BUILTIN:
            schemas.check_builtin(document)
    assert {d["kind"] for d in found} <= schemas.BUILTIN | {"RayService", "HTTPRoute", "ScrapeConfig", "PrometheusRule"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_ray_pods_are_valid_for_every_kubernetes(variant: str) -> None:
    for _, pod in chart.pods(chart.of(variant)):
        schemas.check_builtin({**pod, "metadata": {**pod["metadata"], "name": "pod"}})


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_rayservice_fits_its_crd(variant: str) -> None:
    schemas.check_custom(chart.rayservice(chart.of(variant)))


@pytest.mark.parametrize("variant", MONITORED)
def test_what_the_prometheus_operator_gets_fits_its_crds(variant: str) -> None:
    found = chart.of(variant)
    for document in (*chart.kind(found, "ScrapeConfig"), *chart.kind(found, "PrometheusRule")):
        schemas.check_custom(document)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_service_kuberay_makes_is_valid(variant: str) -> None:
    """The CRD takes anything there, so what KubeRay would send to the API server is checked itself."""
    service = chart.rayservice(chart.of(variant))["spec"]["serveService"]
    schemas.check_builtin(service)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_object_is_there_twice(variant: str) -> None:
    names = [(d["apiVersion"], d["kind"], d["metadata"]["name"]) for d in chart.of(variant)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_pod_is_restricted(variant: str) -> None:
    """The Pod Security Standard `restricted`, and beyond it: no token, no service links, a read-only root, bounds."""
    seen = []
    for where, pod in chart.pods(chart.of(variant)):
        spec = pod["spec"]
        seen.append(where)
        assert spec["securityContext"]["runAsNonRoot"] is True and spec["securityContext"]["runAsUser"] > 0, where
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, where
        assert spec["automountServiceAccountToken"] is False and spec["enableServiceLinks"] is False, where
        assert not {"hostNetwork", "hostPID", "hostIPC", "hostUsers"} & set(spec), where
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False and context["readOnlyRootFilesystem"] is True, where
            assert context["capabilities"] == {"drop": ["ALL"]} and "privileged" not in context, where
            assert "memory" in container["resources"]["limits"] and "cpu" in container["resources"]["requests"], where
            assert all("hostPort" not in port for port in container.get("ports", [])), where
            names = [e["name"] for e in container.get("env", [])]
            assert len(names) == len(set(names)), f"{where}: a variable is set twice"
        kinds = {key for volume in spec.get("volumes", []) for key in volume if key != "name"}
        assert kinds <= {"emptyDir", "secret", "persistentVolumeClaim", "ephemeral"}, where
    assert len(seen) >= 3, "head, a worker and the test hook"


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_secret_stands_in_a_pod(variant: str) -> None:
    """Secrets are files or references; a value in the environment would be readable by whoever may see the RayService."""
    for where, pod in chart.pods(chart.of(variant)):
        for container in [*pod["spec"]["containers"], *pod["spec"].get("initContainers", [])]:
            for entry in container.get("env", []):
                secret = re.search(r"SECRET|TOKEN|PASSWORD|(^|_)KEY$", entry["name"]) and not entry["name"].endswith(
                    "_FILE"
                )
                assert not (secret and "value" in entry), f"{where}: {entry['name']}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_serve_config_is_what_render_prints(variant: str, tmp_path: Path) -> None:
    """The same model files, through the command line and through the chart."""
    given = chart.values(variant)
    assert chart.serve_config(chart.of(variant)) == _rendered(given, tmp_path)


def test_the_repository_s_own_models_serve_the_same_by_both_ways(tmp_path: Path) -> None:
    """`steelyard chart-values` of models/ is what the chart takes."""
    out = _steelyard("chart-values", "--models", str(ROOT / "models"))
    given = chart.values("cpu-tiny") | yaml.safe_load(out)
    assert chart.serve_config(chart.objects(given)) == _rendered(given, tmp_path)


def test_versions_that_look_like_dates_stay_strings(tmp_path: Path) -> None:
    model = tmp_path / "m.yaml"
    model.write_text("name: m\nversions:\n  - {version: 2026-11-01, engine: {kind: simulator}}\n")
    assert yaml.safe_load(_steelyard("chart-values", "--models", str(model)))["models"][0]["versions"] == [
        {"version": "2026-11-01", "engine": {"kind": "simulator"}}
    ]


def _rendered(given: dict[str, Any], folder: Path) -> Any:
    for model in given["models"]:
        (folder / f"{model['name']}.yaml").write_text(yaml.safe_dump(model))
    (folder / "tiny").symlink_to(ROOT / "models" / "tiny")  # the recipe, as beside the models of the image
    nodes = 1 + sum(group["replicas"] for group in given["workers"])
    files = ",".join(str(folder / f"{model['name']}.yaml") for model in given["models"])  # in the values' order
    out = _steelyard(
        *("render", "--json", "--elsewhere", "--models", files, "--profile", given.get("profile", "gpu")),
        *("--gateways", str(given.get("gateways", 1)), "--nodes", str(nodes)),
    )
    # Where the recipes lie is the one thing that differs: on this machine, and in the image.
    return json.loads(out.replace(json.dumps(str(folder)), json.dumps(RECIPES_DIR)))


def _steelyard(*args: str) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith("STEELYARD_")}
    env |= {"PYTHONPATH": str(ROOT), "STEELYARD_CACHE_DIR": CACHE_DIR}
    done = subprocess.run(
        [sys.executable, "-m", "serving.cli.main", *args],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_serve_takes_the_config() -> None:
    """Ray Serve's own schema, as the dashboard applies it to what KubeRay sends."""
    from ray.serve.schema import ServeDeploySchema

    for variant in VARIANTS:
        config = chart.serve_config(chart.of(variant))
        ServeDeploySchema.model_validate(copy.deepcopy(config))


def test_the_catalog_that_python_builds_needs_no_file_of_this_machine() -> None:
    """The pure path, without a process: what the command line does is nothing but this."""
    given = chart.values("one-h100")
    specs = [store.ModelSpec.model_validate(m) for m in given["models"]]
    catalog = store.apply_profile(store.Catalog(tuple(specs), {m.name: Path("/") for m in specs}), "gpu")
    wanted = manifest.serve_config(catalog, gateways=1, nodes=2, locate=lambda source, base: Path(source))
    assert chart.serve_config(chart.of("one-h100")) == wanted


def test_every_template_holds_one_object_behind_a_guard_on_its_first_line() -> None:
    always = {"rayservice.yaml", "smoke.yaml"}
    for path in (CHART / "templates").rglob("*.yaml"):
        text = path.read_text()
        assert len(re.findall(r"^kind:", text, re.M)) == 1, path.name
        if path.name not in always:
            assert text.startswith("{{- if "), f"{path.name}: the guard stands on line 1"
    assert len(list((CHART / "templates").rglob("*.yaml"))) >= 9

"""The chart through real Helm: variants, rendered objects, and the pods among them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

helm = pytest.importorskip("helm_python", reason="helm-python-sdk is not installed: no Helm on this machine")

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "k8s" / "steelyard"
CRDS = ROOT.parent / "shared" / "crds"
VARIANTS = sorted(p.name.removesuffix("-values.yaml") for p in (CHART / "ci").glob("*-values.yaml"))
RELEASE, NAMESPACE = "steelyard", "llm"
KUBERNETES = ("1.30", "1.31", "1.32", "1.33", "1.34")

Object = dict[str, Any]


def values(variant: str) -> dict[str, Any]:
    """Of one variant, read as Helm reads them."""
    text = (CHART / "ci" / f"{variant}-values.yaml").read_text()
    return dict(helm.values_from_yaml(text))


def changed(variant: str, change: dict[str, Any]) -> dict[str, Any]:
    """A variant's values with `change` over it: dotted keys, list indices included, to new values."""
    out = copy.deepcopy(values(variant))
    for path, value in change.items():
        at: Any = out
        *parents, last = [int(p) if p.isdigit() else p for p in path.split(".")]
        for part in parents:
            at = at.setdefault(part, {}) if isinstance(at, dict) else at[part]
        if isinstance(at, list) and last == len(at):
            at.append(value)
        else:
            at[last] = value
    return out


def render(given: dict[str, Any], name: str = RELEASE) -> dict[str, str]:
    """Template path -> text."""
    with helm.Chart.load(CHART) as loaded:
        return dict(loaded.render(given, name=name, namespace=NAMESPACE))


def objects(given: dict[str, Any]) -> list[Object]:
    found = []
    for path, text in render(given).items():
        if not path.endswith(".txt"):
            found += [document for document in yaml.safe_load_all(text) if document]
    return found


@functools.cache
def _of(variant: str) -> list[Object]:
    return objects(values(variant))


def of(variant: str) -> list[Object]:
    """The variant's objects; rendered once."""
    return copy.deepcopy(_of(variant))


def kind(found: list[Object], name: str) -> list[Object]:
    return [o for o in found if o["kind"] == name]


def rayservice(found: list[Object]) -> Object:
    (one,) = kind(found, "RayService")
    return one


def serve_config(found: list[Object]) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(rayservice(found)["spec"]["serveConfigV2"])
    return loaded


def pods(found: list[Object]) -> Iterator[tuple[str, Object]]:
    """(where, pod) of every pod that the objects make: the Ray groups' and the test hook's."""
    for pod in kind(found, "Pod"):
        yield pod["metadata"]["name"], pod
    cluster = rayservice(found)["spec"]["rayClusterConfig"]
    groups = [("head", cluster["headGroupSpec"]), *((g["groupName"], g) for g in cluster["workerGroupSpecs"])]
    for where, group in groups:
        yield where, {"apiVersion": "v1", "kind": "Pod", **copy.deepcopy(group["template"])}

"""Kubernetes' own schemas and the CRDs, made strict: a field that the API server would drop is an error here."""

from __future__ import annotations

import functools
from typing import Any

import jsonschema
import pytest
import yaml

from tests.k8s.chart import CRDS, KUBERNETES, Object

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")


def check_builtin(document: Object) -> None:
    """Raises for the first Kubernetes version whose schema refuses the object."""
    for version in KUBERNETES:
        kubernetes_validate.validate(document, version, strict=True)


@functools.cache
def _crd(plural: str, version: str) -> jsonschema.Draft202012Validator:
    text = (CRDS / f"ray.io_{plural}.yaml").read_text()
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    crd = yaml.load(text, Loader=loader)  # noqa: S506  (the C variant of the safe loader)
    (found,) = [v for v in crd["spec"]["versions"] if v["name"] == version]
    return jsonschema.Draft202012Validator(_strict(found["schema"]["openAPIV3Schema"]))


def check_custom(document: Object) -> None:
    """Against the CRD in the shared folder; skips without it."""
    if not CRDS.is_dir():
        pytest.skip(f"no CRDs in {CRDS}")
    group, version = document["apiVersion"].split("/")
    assert group == "ray.io"
    validator = _crd(document["kind"].lower() + "s", version)
    found = [f"{'.'.join(map(str, e.absolute_path))}: {e.message[:300]}" for e in validator.iter_errors(document)]
    assert not found, "\n".join(found)


def _strict(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    out = {
        key: {k: _strict(v) for k, v in value.items()} if key == "properties" else _strict(value)
        for key, value in schema.items()
    }
    if (
        out.get("type") == "object"
        and "properties" in out
        and "additionalProperties" not in out
        and not out.get("x-kubernetes-preserve-unknown-fields")
        and out["properties"]
    ):
        out["additionalProperties"] = False
    return out

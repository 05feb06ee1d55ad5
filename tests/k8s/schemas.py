"""Kubernetes' own schemas and the CRDs, made strict: a field that the API server would drop is an error here."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.k8s.chart import CRDS, KUBERNETES, Object

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")

BUILTIN = {"Pod", "Secret", "ServiceAccount", "NetworkPolicy", "PodDisruptionBudget", "Ingress", "ConfigMap"}


def check_builtin(document: Object) -> None:
    """Raises for the first Kubernetes version whose schema refuses the object."""
    for version in KUBERNETES:
        kubernetes_validate.validate(document, version, strict=True)


@functools.cache
def _crd(file: Path, version: str) -> jsonschema.Draft202012Validator:
    text = file.read_text()
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    crd = yaml.load(text, Loader=loader)  # noqa: S506  (the C variant of the safe loader)
    (found,) = [v for v in crd["spec"]["versions"] if v["name"] == version]
    return jsonschema.Draft202012Validator(_strict(found["schema"]["openAPIV3Schema"]))


def crd_file(document: Object) -> Path:
    """Where the CRD of the object's kind would lie."""
    return CRDS / f"{document['apiVersion'].split('/')[0]}_{document['kind'].lower()}s.yaml"


def check_custom(document: Object) -> None:
    """Against the CRD in the shared folder; skips without it."""
    file = crd_file(document)
    if not file.is_file():
        pytest.skip(f"no CRD {file}: {document['kind']} was not checked against its schema")
    validator = _crd(file, document["apiVersion"].split("/")[1])
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

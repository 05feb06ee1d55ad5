"""A Kubernetes API server of a hundred lines, for what `lookup` sees: discovery, and the objects that a test put there."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

from tests.k8s.chart import CHART, NAMESPACE, RELEASE, Object, helm

KINDS = {
    "v1": {"Secret": "secrets", "ServiceAccount": "serviceaccounts", "Pod": "pods"},
    "policy/v1": {"PodDisruptionBudget": "poddisruptionbudgets"},
    "networking.k8s.io/v1": {"NetworkPolicy": "networkpolicies", "Ingress": "ingresses"},
    "ray.io/v1": {"RayService": "rayservices"},
    "monitoring.coreos.com/v1alpha1": {"ScrapeConfig": "scrapeconfigs"},
}


class Cluster:
    """Objects by path, and Helm against them."""

    def __init__(self) -> None:
        self.objects: dict[str, Object] = {}
        self.url = ""

    def put(self, document: Object) -> None:
        """As if the release had made it."""
        group, plural = document["apiVersion"], KINDS[document["apiVersion"]][document["kind"]]
        metadata = document["metadata"]
        metadata["namespace"] = NAMESPACE
        metadata.setdefault("labels", {})["app.kubernetes.io/managed-by"] = "Helm"
        metadata.setdefault("annotations", {}).update(
            {"meta.helm.sh/release-name": RELEASE, "meta.helm.sh/release-namespace": NAMESPACE}
        )
        self.objects[f"{_root(group)}/namespaces/{NAMESPACE}/{plural}/{metadata['name']}"] = document

    def helm(self, values: dict[str, Any]) -> list[Object]:
        """What `helm install --dry-run=server` (or `upgrade`, which the templates cannot tell from it) would send."""
        kubeconfig = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {"server": self.url}}],
            "users": [{"name": "u", "user": {"token": "none"}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u", "namespace": NAMESPACE}}],
            "current-context": "c",
        }
        options: dict[str, Any] = {"storage_driver": "memory", "namespace": NAMESPACE, "burst_limit": 500, "qps": 500}
        with helm.Config(kubeconfig_content=yaml.safe_dump(kubeconfig), **options) as config:
            release = config.install(CHART, RELEASE, values, dry_run="server", namespace=NAMESPACE)
        return [document for document in yaml.safe_load_all(release["manifest"]) if document]

    def answer(self, path: str) -> Any:
        """Discovery in the forms that client-go asks for, else an object; None is 404."""
        if path == "/version":
            return {"major": "1", "minor": "34", "gitVersion": "v1.34.0"}
        if path == "/api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/apis":
            groups = [g.split("/") for g in KINDS if "/" in g]
            versions = [(name, {"groupVersion": f"{name}/{v}", "version": v}) for name, v in groups]
            made = [{"name": name, "versions": [v], "preferredVersion": v} for name, v in versions]
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": made}
        if path == "/openapi/v3":
            return {"paths": {_root(g)[1:]: {"serverRelativeURL": f"/openapi/v3{_root(g)}"} for g in KINDS}}
        for group in KINDS:
            if path == _root(group):
                return _resources(group)
            if path == f"/openapi/v3{_root(group)}":
                return _openapi(group)
        return self.objects.get(path)


def _root(group: str) -> str:
    return f"/apis/{group}" if "/" in group else f"/api/{group}"


def _resources(group: str) -> Any:
    verbs = ["get", "list", "create", "patch"]
    found = [
        {"name": plural, "singularName": "", "kind": kind, "namespaced": True, "verbs": verbs}
        for kind, plural in KINDS[group].items()
    ]
    return {"kind": "APIResourceList", "groupVersion": group, "resources": found}


def _openapi(group: str) -> Any:
    """Says that the server validates fields itself, so that Helm does not want the schemas."""
    name, _, version = group.rpartition("/")
    query = [{"name": "fieldValidation", "in": "query"}]
    paths = {}
    for kind, plural in KINDS[group].items():
        operation = {
            "x-kubernetes-group-version-kind": {"group": name, "version": version, "kind": kind},
            "parameters": query,
        }
        paths[f"{_root(group)}/namespaces/{{namespace}}/{plural}"] = {"post": operation, "patch": operation}
    return {"openapi": "3.0.0", "info": {"title": "", "version": "1"}, "paths": paths, "components": {"schemas": {}}}


@contextmanager
def cluster() -> Iterator[Cluster]:
    """An empty cluster on a port of this machine."""
    held = Cluster()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            found = held.answer(self.path.split("?")[0])
            missing = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
            body = json.dumps(found or missing).encode()
            self.send_response(200 if found else 404)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    held.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield held
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

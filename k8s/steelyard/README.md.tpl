# Helm chart of Steelyard

One KubeRay `RayService`, built from the same model files that `steelyard` reads. [docs/kubernetes.md](../../docs/kubernetes.md) goes from a cluster to the
first token, upgrades and removes. This page is generated from the comments of `values.yaml`: `make chart-docs`.

Needs Kubernetes 1.30 or newer, the KubeRay operator 1.6 or newer, and for GPUs NVIDIA's device plugin (and its feature discovery for the node labels).
`monitoring` needs the Prometheus operator with its ScrapeConfig; `monitoring.dashboards` a Grafana with the usual sidecar.

## Values

@VALUES@

## A worker group

@WORKERS@

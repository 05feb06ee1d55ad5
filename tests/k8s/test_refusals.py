"""Nonsense is refused with a sentence, before anything is sent to a cluster."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from serving.catalog.spec import Catalog, ModelSpec, NameClash
from tests.k8s import chart
from tests.k8s.chart import helm

V = "models.0.versions.0"
DAY = {"start": "0 8 * * *", "end": "0 18 * * *", "min": 1}
SECOND = {"version": "x", "weights": {"source": "/srv/weights/x"}}

# What the chart alone can know.
ANOTHER = {
    "name": "second",
    "versions": [
        {
            "version": "v",
            "weights": {"source": "/srv/weights/second"},
            "resources": {"gpus": 1, "accelerator": "H100"},
        }
    ],
}
NONSENSE: list[tuple[dict[str, Any], str]] = [
    ({"image.repository": ""}, "image.repository is empty"),
    ({"models": []}, "models is empty"),
    ({"workers": []}, "workers is empty"),
    ({"workers.0.replicas": 0}, "every group has 0 replicas"),
    ({"workers.1": {"name": "h100", "replicas": 1}}, 'the group "h100" is there twice'),
    ({"workers.0.accelerator": "B300"}, 'the accelerator "B300" is not in accelerators'),
    ({"workers.0.gpus": 0}, "it has an accelerator and no gpus"),
    ({"profile": "cpu"}, "takes GPUs and profile is cpu"),
    ({f"{V}.resources.accelerator": "H200"}, "wants the accelerator H200 and no worker group has it"),
    ({f"{V}.resources.gpus": 2}, "wants 2 GPUs in one pod and the largest H100 worker has 1"),
    ({f"{V}.scaling": {"min": 1, "max": 3}}, "scaling.max is 3, which wants 3 H100 GPUs, and the workers have 1"),
    ({"models.1": ANOTHER}, "models want 2 H100 GPUs and the workers have 1"),
    ({f"{V}.weights.source": "/elsewhere/llama"}, "does not lie below weights.mountPath"),
    ({f"{V}.weights.source": "/srv/weights/../../etc"}, "does not lie below weights.mountPath"),
    ({f"{V}.weights.source": "models/llama"}, "does not lie below weights.mountPath"),
    ({f"{V}.weights.source": "s3://bucket/llama"}, "is no path"),
    ({f"{V}.weights.source": "build:other/v1"}, 'the image has no recipe "other"'),
    ({f"{V}.resources.cpus": 0}, "the engine could land on the head"),
    ({"weights.existingClaim": ""}, "has nowhere to come from"),
    ({"weights.objectStore.enabled": True}, "exclude each other"),
    ({"weights.objectStore.enabled": True, "weights.existingClaim": ""}, "objectStore.source is empty"),
    ({"faultTolerance.backend": "redis"}, "redis.address is empty"),
    (
        {"faultTolerance.backend": "redis", "faultTolerance.redis.address": "r:6379"},
        "networkPolicy.egress.allow is empty",
    ),
    ({"tracing.endpoint": "http://otel:4318"}, "networkPolicy.egress.allow is empty"),
    ({"tracing.existingSecret": "otel"}, "tracing.endpoint is not"),
    ({"tracing.endpoint": "http://user:secret@otel:4318"}, "endpoint"),
    ({"tracing.ratio": 2}, "ratio"),
    ({"ingress.enabled": True}, "ingress.hosts is empty"),
    ({"httpRoute.enabled": True}, "httpRoute.parentRefs is empty"),
    ({"monitoring.enabled": True, "monitoring.interval": "1s"}, "monitoring.interval is 1s"),
    ({"monitoring.enabled": True, "monitoring.interval": "5m"}, "Prometheus forgets a series"),
    ({"monitoring.enabled": True, "monitoring.interval": "often"}, "interval"),
    ({"monitoring.enabled": True, "monitoring.key": "api-key"}, "monitoring.key is api-key, which opens more"),
    ({"monitoring.enabled": True, "monitoring.existingSecret": "steelyard"}, "leave it empty"),
    (
        {"monitoring.enabled": True, "monitoring.labels": {"app.kubernetes.io/name": "x"}},
        "monitoring.labels: app.kubernetes.io/name is set by the chart",
    ),
    ({"monitoring.token": "sk-steelyard"}, "token"),
    ({"networkPolicy.prometheus": []}, "prometheus"),
    ({"serviceAccount.create": False}, "serviceAccount.name is empty"),
    ({"test.model": "ghost"}, 'test.model is "ghost"'),
    ({"extraEnv": [{"name": "HOME", "value": "/"}]}, "HOME is set by the chart"),
    ({"extraEnv": [{"name": "STEELYARD_CLUSTER_SECRET", "value": "x"}]}, "is set by the chart"),
    ({"fullnameOverride": "9lives"}, "cannot name a RayService"),
    ({"fullnameOverride": "x" * 48}, "cannot name a RayService"),
    ({"upgrade.acknowledgedShape": "0123456789ab"}, "set it to"),
    ({"gateway": 2}, "gateway"),
    ({"gateways": 0}, "gateways"),
    ({"image.tags": "x"}, "tags"),
    ({"image.digest": "latest"}, "digest"),
    ({"profile": "tpu"}, "profile"),
    ({"workers.0.replica": 1}, "replica"),
    ({"workers.0.name": "GPU_1"}, "name"),
    ({"workers.0.shmSize": "lots"}, "shmSize"),
    ({"service.type": "ExternalName"}, "type"),
]

# What the model files refuse too: the chart must be no way around them.
BAD_MODELS: list[tuple[dict[str, Any], str]] = [
    ({"models.0.name": "Llama 8B"}, "name"),
    ({"models.0.limit": {}}, "limit"),
    ({f"{V}.version": "a@b"}, "version"),
    ({f"{V}.engine.args": {"host": "0.0.0.0"}}, "host"),
    ({f"{V}.engine.args": {"api-key": "x"}}, "api-key"),
    ({f"{V}.engine.args": {"middleware": "x"}}, "middleware"),
    ({f"{V}.engine.args": {"--seed": 1}}, "--seed"),
    ({f"{V}.engine.args": {"enable_lora": True}}, "enable_lora"),
    ({f"{V}.engine.args": {"hf-overrides": {"a": 1}}}, "hf-overrides"),
    ({f"{V}.engine.env": {"LD_PRELOAD": "x"}}, "LD_PRELOAD"),
    ({f"{V}.engine.env": {"CUDA_VISIBLE_DEVICES": "0"}}, "CUDA_VISIBLE_DEVICES"),
    ({f"{V}.engine.kind": "sglang"}, "kind"),
    ({f"{V}.resources": {"gpus": 1.5}}, "whole number"),
    ({f"{V}.resources": {"gpus": -1}}, "gpus"),
    ({f"{V}.resources": {"gpus": 1}, f"{V}.engine.args": {"tensor-parallel-size": 4}}, "gpus is at least 4"),
    ({f"{V}.weights": None}, "has no weights"),
    ({f"{V}.scaling": {"min": 2, "max": 1}}, "scaling.min is 2 and scaling.max 1: max is at least min"),
    ({f"{V}.scaling": {"min": 1, "max": 1, "idle_to_zero_s": 60}}, "scaling.idle_to_zero_s needs min: 0 (min is 1)"),
    ({f"{V}.scaling": {"max": 1, "schedule": [{**DAY, "min": 2}]}}, "wants 2 replicas and scaling.max is 1"),
    ({f"{V}.scaling": {"max": 1, "schedule": [{**DAY, "start": "8:00"}]}}, "start"),
    ({"models.0.versions": []}, "versions"),
    ({"models.0.versions.1": {**SECOND, "version": "2026-11-01"}}, "listed twice"),
    ({"models.0.versions.1": SECOND}, "no release.stable"),
    ({"models.0.release": {"stable": "ghost"}}, "it names one of the versions"),
    ({f"{V}.adapters": [{"name": "a", "source": "/srv/weights/a"}] * 2}, "listed twice"),
    ({f"{V}.adapters": [{"name": "llama-8b", "source": "/srv/weights/a"}]}, "is taken"),
    ({"models.1": {"name": "llama-8b", "versions": [SECOND]}}, "is there twice"),
    (
        {
            "models.1": {
                "name": "b",
                "versions": [{**SECOND, "adapters": [{"name": "c", "source": "/srv/weights/c"}]}],
            },
            "models.2": {"name": "c", "versions": [SECOND]},
        },
        "is there twice",
    ),
    ({"models.0.allow": ["store"]}, "allow"),
    ({"models.0.limits": {"max_queue": -1}}, "max_queue"),
]


@pytest.mark.parametrize(("change", "sentence"), NONSENSE, ids=lambda v: v if isinstance(v, str) else "")
def test_nonsense_values_are_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(helm.HelmError, match=_literally(sentence)):
        chart.render(chart.changed("one-h100", change))


@pytest.mark.parametrize(("change", "sentence"), BAD_MODELS, ids=lambda v: v if isinstance(v, str) else "")
def test_a_model_that_python_refuses_is_refused_by_the_chart(change: dict[str, Any], sentence: str) -> None:
    given = chart.changed("one-h100", change)
    with pytest.raises(helm.HelmError, match=_literally(sentence)):
        chart.render(given)
    with pytest.raises((ValidationError, NameClash)):
        Catalog(tuple(ModelSpec.model_validate(m) for m in given["models"]))


def _literally(text: str) -> str:
    import re

    return re.escape(text)

"""Catalog -> Serve config: pure. What `steelyard render` prints is what `steelyard up` applies and the chart carries.

Serve rolls an application's replicas when its import path, runtime env or `args` change. So `args` hold only what
identifies weights and engine argv (an `EngineSpec`); counts, grace, health and knobs are `deployments:` overrides, and
request limits reach the gateways by `user_config`, which Serve hands over without a restart.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from serving.catalog.spec import Catalog, ModelSpec, Scaling, Version
from serving.engine.command import AdapterSpec, EngineSpec
from serving.fleet.endpoint import GATEWAY_APP, GATEWAY_DEPLOYMENT

POLICY = "serving.fleet.serve_policy:policy"
PROXY_LOCATION = "Disabled"  # clients reach the gateways' own listeners
STOP_GRACE_S = 25.0  # beyond the drain bound: stopping the engine itself, which may take 20

# (source, folder of the model's file) -> path of the weights as the node that runs the engine sees it
Locate = Callable[[str, Path], Path]


def serve_config(catalog: Catalog, *, gateways: int, locate: Locate, nodes: int = 1) -> dict[str, Any]:
    """The multi-application Serve config of the whole catalog, with `gateways` of them on each of `nodes` nodes."""
    apps = [_engine_app(catalog, model, version, locate) for model, version in catalog.versions()]
    return {
        "proxy_location": PROXY_LOCATION,
        "applications": [_gateway_app(catalog, gateways, nodes), *apps],
    }


def engine_spec(catalog: Catalog, model: ModelSpec, version: Version, locate: Locate) -> EngineSpec:
    """What identifies one version's engine."""
    base = catalog.folders[model.name]
    weights = str(locate(version.weights.source, base)) if version.weights else model.name
    return EngineSpec(
        model=model.name,
        version=version.version,
        kind=version.engine.kind,
        weights=weights,
        served_names=[model.name, f"{model.name}@{version.version}"],
        args=dict(version.engine.args),
        env=dict(version.engine.env),
        adapters=[AdapterSpec(a.name, str(locate(a.source, base))) for a in version.adapters],
    )


def gateway_config(catalog: Catalog) -> dict[str, Any]:
    """The gateways' part of the catalog, as `serving.gateway.state.CatalogConfig` reads it."""
    names: dict[str, Any] = {}
    for name, to in catalog.served_names.items():
        names[name] = {"model": to.model, "version": to.version}
        if to.adapter is not None:
            names[name]["adapter"] = to.adapter
            if name != to.adapter:  # adapter@version: the engine knows the adapter alone
                names[name]["sent_as"] = to.adapter
    models = [
        {
            "name": m.name,
            "versions": [v.version for v in m.versions],
            "required": [v.version for v in m.versions if v.scaling.min > 0],
            "allow": list(m.allow),
            "slo": {"ttft_s": m.slo.ttft_s, "objective": m.slo.objective},
            "limits": {
                "max_queue": m.limits.max_queue,
                "max_wait_s": m.limits.max_wait_s,
                "request_timeout_s": m.limits.request_timeout_s,
                "max_body_bytes": m.limits.max_body_bytes,
                "keep_alive_after_s": m.limits.keep_alive_after_s,
                "max_input_tokens": m.limits.max_input_tokens,
                "max_concurrent": m.limits.max_concurrent,
                "tokens_per_minute": m.limits.tokens_per_minute,
            },
        }
        for m in catalog.models
    ]
    drain = max((v.drain_s for _, v in catalog.versions()), default=30.0)
    return {"models": models, "names": names, "drain_s": drain}


def _gateway_app(catalog: Catalog, gateways: int, nodes: int) -> dict[str, Any]:
    config = gateway_config(catalog)
    return {
        "name": GATEWAY_APP,
        "route_prefix": None,
        "import_path": "serving.gateway.deployment:build",
        "external_scaler_enabled": True,  # bare metal: `fleet/keeper` follows the nodes that come and go
        "deployments": [
            {
                "name": GATEWAY_DEPLOYMENT,
                "num_replicas": gateways * nodes,
                "max_replicas_per_node": gateways,  # any node answers for every model
                "user_config": config,
                "graceful_shutdown_timeout_s": config["drain_s"] + STOP_GRACE_S,
                "graceful_shutdown_wait_loop_s": 0.1,
                "health_check_period_s": 5.0,  # Ray itself sees at once when the process dies
                "health_check_timeout_s": 10.0,
                "max_ongoing_requests": 100,
                "ray_actor_options": {"num_cpus": 0},
            }
        ],
    }


def _engine_app(catalog: Catalog, model: ModelSpec, version: Version, locate: Locate) -> dict[str, Any]:
    where = f"{model.name}@{version.version}"
    spec = engine_spec(catalog, model, version, locate)
    options: dict[str, Any] = {"num_cpus": version.resources.cpus}
    if version.resources.gpus:
        options["num_gpus"] = version.resources.gpus
    if version.resources.accelerator:
        options["accelerator_type"] = version.resources.accelerator
    if model.placement.labels:
        options["label_selector"] = dict(model.placement.labels)
    return {
        "name": where,
        "route_prefix": None,
        "import_path": "serving.replica:build",
        "args": msgspec.to_builtins(spec),
        "deployments": [
            {
                "name": "engine",
                "num_replicas": "auto",
                "autoscaling_config": autoscaling_config(version.scaling, spec.slots),
                "user_config": {
                    "start_timeout_s": version.start_timeout_s,
                    "drain_s": version.drain_s,
                    "stuck_timeout_s": version.stuck_timeout_s,
                    "builds": _builds(catalog, model, version),
                    # For `serve_policy`, which reads it here: Serve's autoscaling config has no place for it.
                    "schedule": [entry.model_dump() for entry in version.scaling.schedule],
                },
                "graceful_shutdown_timeout_s": version.drain_s + STOP_GRACE_S,
                "graceful_shutdown_wait_loop_s": 0.1,
                "health_check_period_s": 1.0,
                "health_check_timeout_s": 10.0,
                "max_ongoing_requests": 5000,  # none comes; Serve wants it above `target_ongoing_requests`
                "ray_actor_options": options,
            }
        ],
    }


def autoscaling_config(scaling: Scaling, slots: int) -> dict[str, Any]:
    """Also where min equals max: the policy's name is part of what rolls an application, and giving a fixed version
    bounds must not. Every other field may change at run time; `fleet/serve_policy` reads them."""
    config: dict[str, Any] = {
        "policy": {"policy_function": POLICY},
        "min_replicas": scaling.min,
        "max_replicas": scaling.max,
        "target_ongoing_requests": scaling.target_ongoing or max(1, slots * 3 // 4),  # room while another one starts
        "downscale_delay_s": scaling.scale_down_after_s,
    }
    if scaling.idle_to_zero_s is not None:
        config["downscale_to_zero_delay_s"] = scaling.idle_to_zero_s
    return config


def _builds(catalog: Catalog, model: ModelSpec, version: Version) -> list[dict[str, str]]:
    """What a node must build itself when it lacks it. Not among the `args`: where the recipe lies identifies nothing."""
    sources = [version.weights.source] if version.weights else []
    sources += [a.source for a in version.adapters]
    base = str(catalog.folders[model.name])
    return [{"source": s, "base": base} for s in sources if s.startswith("build:")]

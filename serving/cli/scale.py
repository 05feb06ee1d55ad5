"""`steelyard scale`: why a version has the replicas it has, and other bounds at run time."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from serving.cli import bounds, cluster, up
from serving.cli.bounds import Bounds
from serving.cli.simulate import simulate
from serving.cli.term import one_line_errors
from serving.errors import OperatorError, counted
from serving.fleet import manifest, serve_policy
from serving.fleet.directory import unpack
from serving.fleet.endpoint import GATEWAY_APP
from serving.fleet.history import Change
from serving.fleet.scaling import holds
from serving.settings import Settings, load_settings

scale_app = typer.Typer(help="Replica counts: why they are what they are, and their bounds.", no_args_is_help=True)
scale_app.command()(simulate)

Model = Annotated[str, typer.Argument(help="MODEL or MODEL@VERSION.", metavar="MODEL[@VERSION]")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
State = Annotated[Path | None, typer.Option(help="Folder of keys, secrets, pid and logs.")]

AppConfig = dict[str, Any]


@scale_app.command()
def explain(
    model: Model, last: Annotated[int, typer.Option(min=1, max=50)] = 10, state_dir: State = None, as_json: Json = False
) -> None:
    """The load now and the last changes of each version, with the reason for each."""
    with one_line_errors(), redirect_stdout(sys.stderr):
        told = _explained(load_settings(state_dir=state_dir), model, last)
    if as_json:
        print(json.dumps(msgspec.to_builtins(told)))
        return
    for version in told:
        load, scaling = version["load"], version["scaling"]
        allowed = f"{scaling['min']} to {scaling['max']} allowed"
        print(f"{version['version_id']}: {load.ready} of {load.replicas} replicas ready, {allowed}")
        print(
            f"  now: held {load.held}, running {load.running} of {load.ready * load.slots if load.ready else 0} slots, "
            f"waiting in engines {load.waiting}, KV {load.kv_usage:.0%}; target {scaling['target_ongoing']:g} per replica"
        )
        for floor in scaling["schedule"]:
            when = f'from "{floor["start"]}" to "{floor["end"]}" {floor["timezone"]}'
            print(f"  scheduled: at least {floor['replicas']} {when}{' (now)' if floor['holds_now'] else ''}")
        if version["failures"]:
            print(f"  {counted(version['failures'], 'start')} failed: {version['failure']}")
        for change in reversed(version["changes"]):
            print(f"  {_clock(change.at)}  {change.before} -> {change.after}  {change.cause}: {change.reason}")
        if not version["changes"]:
            print("  no change yet")


@scale_app.command("set")
def set_(
    model: Model,
    min_: Annotated[int | None, typer.Option("--min", help="Replicas at least.")] = None,
    max_: Annotated[int | None, typer.Option("--max", help="Replicas at most.")] = None,
    state_dir: State = None,
) -> None:
    """Other bounds now, and for every later `steelyard up`, until `steelyard scale reset`. MODEL alone is its stable
    version. Nothing restarts."""
    with one_line_errors(), redirect_stdout(sys.stderr):
        settings = load_settings(state_dir=state_dir)
        _refuse_if_managed(settings, model)
        if min_ is None and max_ is None:
            raise OperatorError("nothing to set", "give --min, --max or both")
        with _on_head(settings):
            apps = cluster.deployed_apps()
            name = _version(apps, model)
            old = _bounds_of(apps[name])
            low, high = old.min if min_ is None else min_, old.max if max_ is None else max_
            try:
                new = Bounds(min=low, max=high)
            except ValueError as e:
                fix = "give both --min and --max" if high < low and None in (min_, max_) else ""
                raise OperatorError(f"{name}: {e} (now {old.min} to {old.max})", fix) from None
            kept = bounds.read(settings)
            bounds.write(settings, kept | {name: new})
            try:
                _apply(apps, name, new)
            except Exception:
                bounds.write(settings, kept)
                raise
        said = f"{name}: {new.min} to {new.max} replicas (before: {old.min} to {old.max})"
    print(f"{said}; kept in {bounds.path(settings)} until `steelyard scale reset {name}`")


@scale_app.command()
def reset(
    model: Model,
    models: Annotated[str | None, typer.Option(help="Folder of model files.")] = None,
    state_dir: State = None,
) -> None:
    """Back to the bounds of the model file."""
    with one_line_errors(), redirect_stdout(sys.stderr):
        settings = load_settings(models=models, state_dir=state_dir)
        _refuse_if_managed(settings, model)
        with _on_head(settings):
            apps, kept = cluster.deployed_apps(), bounds.read(settings)
            name = model if model in kept else _version(apps, model)
            if name not in kept:
                raise OperatorError(f"{name} has no bounds of its own", "`steelyard scale set` gives some")
            catalog = up.load_catalog(settings)
            found = {f"{m.name}@{v.version}": v.scaling for m, v in catalog.versions()}.get(name)
            if found is None and name in apps:
                raise OperatorError(f"{settings.models} has no {name}", "name its catalog with --models")
            if name in apps and found is not None:
                _apply(apps, name, Bounds(min=found.min, max=found.max))
            bounds.write(settings, {n: b for n, b in kept.items() if n != name})
    back = f"{found.min} to {found.max} replicas, as its model file says" if found else "its bounds are forgotten"
    print(f"{name}: {back}" + ("" if name in apps else "; it is not served"))


# -- what is asked and told ----------------------------------------------------------------------------------------


def _explained(settings: Settings, model: str, last: int) -> list[dict[str, Any]]:
    with cluster.joined(settings):
        apps, counts, table = cluster.deployed_apps(), cluster.target_counts(), cluster.snapshot()
        names = sorted(n for n in apps if n == model or n.startswith(f"{model}@"))
        if not names:
            raise OperatorError(_unknown(apps, model))
        told = []
        for name in names:
            changes = unpack(cluster.ask_directory("history", name), list[Change])
            facts = table.versions.get(name)
            config = _engine(apps[name])["autoscaling_config"]
            told.append(
                {
                    "version_id": name,
                    "load": serve_policy.observe(table, name, counts.get(name, 0), 0.0),
                    "scaling": {
                        "min": config["min_replicas"],
                        "max": config["max_replicas"],
                        "target_ongoing": config["target_ongoing_requests"],
                        "scale_down_after_s": config["downscale_delay_s"],
                        "idle_to_zero_s": config.get("downscale_to_zero_delay_s"),
                        "schedule": [
                            {**msgspec.to_builtins(floor), "holds_now": holds(floor, int(time.time() // 60))}
                            for floor in serve_policy.floors_of(_engine(apps[name]).get("user_config"))
                        ],
                    },
                    "failures": facts.failures if facts else 0,
                    "failure": facts.reason if facts else "",
                    "changes": changes[-last:],
                }
            )
    return told


def _apply(apps: dict[str, AppConfig], name: str, new: Bounds) -> None:
    """The config that is served now with these bounds in it: what was edited in the catalog since waits for `up`."""
    set_bounds(apps, name, new)
    # Nodes may have come or gone since it was applied: `fleet/keeper` follows them.
    gateway = _gateway(apps)
    gateway["num_replicas"] = cluster.target_counts().get(GATEWAY_APP) or gateway["num_replicas"]
    cluster.apply({"proxy_location": manifest.PROXY_LOCATION, "applications": list(apps.values())})


def set_bounds(apps: dict[str, AppConfig], name: str, new: Bounds) -> None:
    """What the manifest writes for such bounds. The time until zero stays where `min` is above it: the policy knows, and
    `--min 0` finds it again."""
    _engine(apps[name])["autoscaling_config"] |= {"min_replicas": new.min, "max_replicas": new.max}
    gateway = _gateway(apps)
    model, _, version = name.partition("@")
    for entry in gateway["user_config"]["models"]:
        if entry["name"] == model:
            others = [v for v in entry["required"] if v != version]
            entry["required"] = [v for v in entry["versions"] if v in others or (v == version and new.min > 0)]


def _version(apps: dict[str, AppConfig], model: str) -> str:
    """The version id that is meant: MODEL alone is its stable version."""
    to = _gateway(apps)["user_config"]["names"].get(model)
    if to is None or to.get("adapter") is not None:
        raise OperatorError(_unknown(apps, model))
    return f"{to['model']}@{to['version']}"


def _unknown(apps: dict[str, AppConfig], model: str) -> str:
    there = ", ".join(sorted(apps.keys() - {GATEWAY_APP})) or "nothing"
    return f"{model or repr(model)} is not served here; there is: {there}"


def _gateway(apps: dict[str, AppConfig]) -> dict[str, Any]:
    found: dict[str, Any] = apps[GATEWAY_APP]["deployments"][0]
    return found


def _engine(app: AppConfig) -> dict[str, Any]:
    found: dict[str, Any] = app["deployments"][0]
    return found


def _bounds_of(app: AppConfig) -> Bounds:
    config = _engine(app)["autoscaling_config"]
    return Bounds(min=config["min_replicas"], max=config["max_replicas"])


@contextmanager
def _on_head(settings: Settings) -> Iterator[None]:
    running = cluster.read_cluster_file(settings)
    if running is not None and running.role == "worker":
        raise OperatorError("this node is a worker", "bounds are set and kept on the head: run this there")
    with cluster.joined(settings):
        if GATEWAY_APP not in cluster.app_statuses():
            raise OperatorError("nothing is served yet", "run `steelyard up` first")
        with cluster.only_writer(settings):
            yield


def _refuse_if_managed(settings: Settings, model: str) -> None:
    if settings.managed_by:
        name, _, version = model.partition("@")
        which = f"models[name={name}].versions[{f'version={version}' if version else 'the stable one'}]"
        raise OperatorError(
            "bounds are not set here: what this cluster serves is written by its RayService alone",
            f"change {which}.scaling.min and .max in the chart's values and run `helm upgrade`; nothing restarts",
        )


def _clock(at: float) -> str:
    return datetime.fromtimestamp(at).astimezone().strftime("%Y-%m-%d %H:%M:%S")

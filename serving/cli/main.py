"""`steelyard`: thin commands over the rooms. Every reading command has `--json`."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from serving import __version__
from serving.catalog import store
from serving.cli import bounds, cluster, doctor, keys, node, up
from serving.cli.logs import logs
from serving.cli.scale import scale_app
from serving.cli.term import one_line_errors, show
from serving.cli.top import top
from serving.errors import OperatorError
from serving.fleet import endpoint, manifest
from serving.fleet.endpoint import GATEWAY_APP, Snapshot, quarantines
from serving.settings import Settings, load_settings

app = typer.Typer(
    help="Serve your own weights on your own GPUs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(keys.app, name="keys")
app.add_typer(node.app, name="node")
app.add_typer(scale_app, name="scale")
app.command()(logs)
app.command()(top)

Models = Annotated[str | None, typer.Option(help="Folder of model files, one file, or a comma list.")]
ProfileOption = Annotated[str | None, typer.Option(help="cpu, gpu or sim; by default what this machine has.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
State = Annotated[Path | None, typer.Option(help="Folder of keys, secrets, pid and logs.")]


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"steelyard {__version__}")
        raise typer.Exit


@app.command("up")
def up_(
    models: Models = None,
    profile: ProfileOption = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    gateways: Annotated[int | None, typer.Option(help="Gateway replicas on each node.")] = None,
    state_dir: State = None,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Return when ready; `steelyard down` stops it.")
    ] = False,
) -> None:
    """Start the stack, or apply the catalog to the one that runs: only what changed is touched."""
    with one_line_errors():
        settings = load_settings(
            models=models, profile=profile, host=host, port=port, gateways=gateways, state_dir=state_dir
        )
        _refuse_if_managed(settings, "up")
        if detach:
            for name in ("models", "profile", "host", "port", "gateways", "state_dir"):
                value = getattr(settings, name)
                if value is not None:
                    os.environ[f"STEELYARD_{name.upper()}"] = str(value)
            up.detach(settings, up.detached_argv(), _say)
        else:
            up.run(settings, _say)


@app.command()
def down(state_dir: State = None) -> None:
    """Stop the stack; streams in progress get a few seconds."""
    with one_line_errors():
        settings = load_settings(state_dir=state_dir)
        _refuse_if_managed(settings, "down")
        up.down(settings, _say)


@app.command()
def status(state_dir: State = None, as_json: Json = False) -> None:
    """What runs: applications, replicas, load."""
    with one_line_errors():
        settings = load_settings(state_dir=state_dir)
        # Ray prints its news, such as a node's death, on stdout: not between a script and its JSON.
        with redirect_stdout(sys.stderr), cluster.joined(settings):
            apps, table, nodes = cluster.app_statuses(), cluster.snapshot(), cluster.nodes()
        if as_json:
            import msgspec

            replicas = [msgspec.to_builtins(e) for e in table.endpoints]
            gateways = [msgspec.to_builtins(g) for g in table.gateways]
            versions = {v: msgspec.to_builtins(f) for v, f in table.versions.items()}
            told = {n: {"status": s, "message": m} for n, (s, m) in apps.items()}
            print(
                json.dumps(
                    {
                        "applications": told,
                        "replicas": replicas,
                        "gateways": gateways,
                        "nodes": nodes,
                        "versions": versions,
                    }
                )
            )
            return
        for n in nodes:
            gpus = f", {n['gpus']:g} GPUs" if n["gpus"] else ""
            print(f"{n['role']} {n['node']}{gpus}")
        view = Table("application", "status", "replica", "state", "in flight", "slots", "url", box=None, pad_edge=False)
        for name, (state, _) in sorted(apps.items()):
            rows: list[tuple[str, ...]] = [
                (e.id, str(e.state), str(e.in_flight), str(e.slots), e.url)
                for e in table.endpoints
                if e.version_id == name
            ]
            if name == GATEWAY_APP:
                rows = [(g.id, "", "", "", g.url) for g in table.gateways]
            for row in rows or [("",) * 5]:
                view.add_row(name, state, *row)
        show(view)
        print(*_troubles(table), sep="", end="")


def _troubles(table: Snapshot) -> Iterator[str]:
    """A line for everything that is not as it should be: replicas and quarantines."""
    now = time.time()
    ready = {e.version_id for e in table.endpoints if e.state is endpoint.State.READY}
    for e in table.endpoints:
        if e.state in (endpoint.State.SUSPECT, endpoint.State.FAILED):
            yield f"{e.id} is {e.state}: {e.reason}\n"
    for version, facts in sorted(table.versions.items()):
        for where, (until, crashes) in quarantines(facts, now, alone=version not in ready).items():
            yield (
                f"{version} is quarantined on {where} for {until - now:.0f} s: {len(crashes)} failures, "
                f"the last: {crashes[-1].reason}\n"
            )


@app.command()
def models(models: Models = None, profile: ProfileOption = None, as_json: Json = False) -> None:
    """What the catalog serves: names, versions, adapters."""
    with one_line_errors():
        catalog = up.load_catalog(load_settings(models=models, profile=profile))
        if as_json:
            print(json.dumps([m.model_dump(mode="json") for m in catalog.models]))
            return
        view = Table("model", "version", "engine", "weights", "adapters", "replicas", box=None, pad_edge=False)
        for m, v in catalog.versions():
            stable = " (stable)" if m.release.stable == v.version else ""
            source = v.weights.source if v.weights else "-"
            adapters = ", ".join(a.name for a in v.adapters) or "-"
            counts = f"{v.scaling.min}" if v.scaling.min == v.scaling.max else f"{v.scaling.min} to {v.scaling.max}"
            view.add_row(m.name, v.version + stable, v.engine.kind, source, adapters, counts)
        show(view)


@app.command()
def render(
    models: Models = None,
    profile: ProfileOption = None,
    gateways: Annotated[int | None, typer.Option(help="Gateway replicas on each node.")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the cluster.")] = 1,
    elsewhere: Annotated[
        bool, typer.Option("--elsewhere", help="Weights lie on other machines; none is looked for here.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print the Serve config that `up` applies, and that the Helm chart carries."""
    with one_line_errors():
        settings = load_settings(models=models, profile=profile, gateways=gateways)
        catalog, said = bounds.laid_over(up.load_catalog(settings), settings)
        print(*said, sep="\n", end="\n" if said else "", file=sys.stderr)
        locate = up.locator(settings, here=not elsewhere)
        config = manifest.serve_config(catalog, gateways=settings.gateways, nodes=nodes, locate=locate)
        if as_json:
            print(json.dumps(config))
        else:
            import yaml

            print(yaml.safe_dump(config, sort_keys=False, width=120), end="")


@app.command("chart-values")
def chart_values(models: Models = None) -> None:
    """Print the catalog as values of the Helm chart: `models:`, each entry one model file, unchanged."""
    with one_line_errors():
        import yaml

        settings = load_settings(models=models)
        specs = store.load(settings.models, "gpu").models  # refuses what the chart could not serve either
        entries = [store.document(file) for file in store.files(settings.models)]
        print(f"# {len(specs)} model(s) of {settings.models}, by `steelyard chart-values`")
        print(yaml.safe_dump({"models": entries}, sort_keys=False, width=120, allow_unicode=True), end="")


def _refuse_if_managed(settings: Settings, verb: str) -> None:
    """On Kubernetes the RayService writes the Serve config; a second writer would be undone, or undo it."""
    if settings.managed_by:
        raise OperatorError(
            f"`steelyard {verb}` is refused here: what this cluster serves is written by its RayService alone",
            "change the chart's values and run `helm upgrade` (`helm uninstall` to stop)",
        )


@app.command(
    "doctor",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    help="May this machine run a node? `steelyard doctor --help` lists the options.",
)
def doctor_(context: typer.Context) -> None:
    # The file also runs alone on bare hosts, so its options are its own; this node's settings are their defaults.
    with one_line_errors():
        settings = load_settings()
        folders = ["--state-dir", str(settings.state_dir), "--cache-dir", str(settings.cache_dir)]
        raise typer.Exit(doctor.main([*folders, "--port", str(settings.port), *context.args]))


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    app()

"""`make deploy`: from an inventory to a ready endpoint. `deploy`, `upgrade` and `remove` are the summaries; each step is a room.

Every step may be run again: it looks first and changes what differs. A machine that fails ends the run with its reason, the
others stay as they are, and the next run goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from deploy import check, cluster, layout, place, roll
from deploy import release as releases
from deploy import remove as removal
from deploy.inventory import Inventory
from deploy.release import Release
from deploy.target import Fleet, Say, Target
from serving.catalog import store
from serving.catalog.spec import Catalog
from serving.errors import OperatorError

_HIDDEN = ("/home/", "/root/", "/run/user/", "/tmp/", "/var/tmp/")


def deploy(inventory: Inventory, *, dry_run: bool, console: Console, say: Say) -> int:
    """Brings every machine of the inventory where it should be; the number of changes."""
    return _converge(inventory, dry_run=dry_run, upgrade=False, downtime=False, console=console, say=say)


def upgrade(inventory: Inventory, *, dry_run: bool, downtime: bool, console: Console, say: Say) -> int:
    """The same with the release of this checkout: worker by worker, then the head."""
    return _converge(inventory, dry_run=dry_run, upgrade=True, downtime=downtime, console=console, say=say)


def _converge(inventory: Inventory, *, dry_run: bool, upgrade: bool, downtime: bool, console: Console, say: Say) -> int:
    catalog = load_catalog(inventory)
    release = releases.build(inventory.serve.profile)
    fleet = Fleet(inventory, dry_run=dry_run, say=say)
    try:
        fleet.connect()
        check.check(fleet, release, console)
        _may_roll(fleet, release, upgrade=upgrade, downtime=downtime)
        digests = _lay_down(fleet, catalog, release)
        if dry_run:
            _would_roll(fleet, digests)
        else:
            if roll.roll(fleet, release, digests, downtime=downtime):
                cluster.joined(fleet)
        cluster.apply(fleet, place.catalog_digest(inventory.serve.models))
        if not dry_run:
            cluster.ready(fleet)
            fleet.each(lambda t: _tidy(t, inventory, release))
        _tell(fleet, catalog, say)
        return fleet.changes
    finally:
        fleet.close()


def _lay_down(fleet: Fleet, catalog: Catalog, release: Release) -> dict[str, str]:
    """Everything on every machine; the digest of what each is to run."""
    inventory = fleet.inventory
    have: dict[str, dict[str, str]] = {}
    _or_end(fleet.each(place.require_no_leftover_role))
    _or_end(fleet.each(lambda t: have.update({t.name: place.read_secrets(t)})))
    secrets = place.agreed([have[t.name] for t in fleet.targets])
    digests: dict[str, str] = {}

    def lay(target: Target) -> None:
        place.user_and_folders(target)
        place.source(target, release)
        place.runtime(target, inventory, release)
        place.write_secrets(target, secrets, have[target.name])
        place.redis_password(target, inventory)
        place.otlp_headers(target, inventory)
        settings = place.settings(target, inventory, catalog)
        place.models(target, inventory.serve.models)
        digests[target.name] = roll.wanted_digest(settings, secrets, inventory, release)

    _or_end(fleet.each(lay))
    return digests


def remove(inventory: Inventory, *, limit: list[str], dry_run: bool, confirm: Callable[[str], bool], say: Say) -> int:
    """Takes the machines of the inventory (or those of `limit`) back to what they were; the number of changes."""
    _require_known(inventory, limit)
    fleet = Fleet(inventory, dry_run=dry_run, say=say, only=limit)
    names = ", ".join(t.name for t in fleet.targets)
    if not dry_run and not confirm(f"remove Steelyard, its keys, state and cached weights from {names}?"):
        raise OperatorError("not confirmed", "nothing was changed")
    try:
        fleet.connect()
        # The head last: workers drain through it.
        for role in ("worker", "head"):
            _or_end(fleet.each(removal.remove, [t for t in fleet.targets if t.role == role]))
        return fleet.changes
    finally:
        fleet.close()


def _require_known(inventory: Inventory, limit: list[str]) -> None:
    known = {m.host for m in inventory.machines}
    for name in limit:
        if name not in known:
            raise OperatorError(f"{name} is not in the inventory", f"it has {', '.join(sorted(known))}")
    if inventory.head.host in limit and not known <= set(limit):
        raise OperatorError(
            f"{inventory.head.host} is the head", "its workers cannot go on alone: remove all, or workers only"
        )


# -- before and after ---------------------------------------------------------------------------------------------------


def load_catalog(inventory: Inventory) -> Catalog:
    """The catalog as the machines will read it; its mistakes are told before any machine is touched."""
    folder = inventory.serve.models
    if not folder.is_dir():
        raise OperatorError(f"{folder}: no such folder of model files", "set serve.models in the inventory")
    big = next((f for f in folder.rglob("*") if f.is_file() and f.stat().st_size > 16 * 1024 * 1024), None)
    if big is not None:
        raise OperatorError(
            f"{big} is {big.stat().st_size // 2**20} MiB", "the catalog goes to every machine: weights belong elsewhere"
        )
    catalog = store.load(folder, inventory.serve.profile)
    for model, version in catalog.versions():
        for source in [w.source for w in [version.weights] if w] + [a.source for a in version.adapters]:
            if source.startswith(_HIDDEN):
                raise OperatorError(
                    f"{model.name}@{version.version}: {source} is below a folder that the units cannot see",
                    "put the weights below /srv, /data or /mnt",
                )
    return catalog


def _may_roll(fleet: Fleet, release: Release, *, upgrade: bool, downtime: bool) -> None:
    """Nodes of one cluster run one release, and one version of Ray at any moment."""
    found: dict[str, tuple[str, str]] = {}

    def look(target: Target) -> None:
        code = "import importlib.metadata as m; print(m.version('ray'))"
        ray = target.ask(f'{layout.VENV}/bin/python -I -c "{code}" 2>/dev/null').text
        found[target.name] = (place.running_release(target), ray)

    _or_end(fleet.each(look))
    other = [n for n, (r, _) in found.items() if r and r != release.id]
    if other and not upgrade:
        raise OperatorError(
            f"{', '.join(other)} run release {found[other[0]][0]}, this checkout is {release.id}",
            "`make deploy-upgrade` moves machine by machine; or check out what runs",
        )
    rays = sorted({ray for _, ray in found.values() if ray and ray != release.ray})
    if rays and not downtime:
        raise OperatorError(
            f"the cluster runs Ray {', '.join(rays)}, this release needs {release.ray}: its nodes cannot join each other",
            "`make deploy-upgrade DOWNTIME=1` stops the whole cluster, then starts the new one",
        )


def _would_roll(fleet: Fleet, digests: dict[str, str]) -> None:
    def look(target: Target) -> None:
        if not roll.is_active(target):
            target.tell(f"{target.unit} starts")
        elif roll.running(target) != digests[target.name]:
            target.tell(f"{target.unit} restarts")

    _or_end(fleet.each(look))


def _tidy(target: Target, inventory: Inventory, release: Release) -> None:
    """Releases and runtimes that nothing runs any more, but for the newest one, to go back to."""
    keep = {layout.RELEASES: release.id, layout.RUNTIMES: Path(place.runtime_path(inventory, release)).name}
    for folder, current in keep.items():
        others = [n for n in target.ask(f"ls -1t {folder} 2>/dev/null").out if n != current]
        old = [n for n in others[1:] if n and "/" not in n]
        if old:
            target.run(f"old {Path(folder).name} removed: {' '.join(old)}", f"cd {folder} && rm -rf {' '.join(old)}")


def _tell(fleet: Fleet, catalog: Catalog, say: Say) -> None:
    say(
        f"{fleet.changes} changes"
        if not fleet.dry_run
        else f"{fleet.changes} changes would be made; nothing was changed"
    )
    if fleet.dry_run:
        return
    urls = cluster.endpoints(fleet)
    say(
        f"endpoint: {urls[0]}"
        + (f"  (and {', '.join(urls[1:])}: any machine answers for every model)" if urls[1:] else "")
    )
    say(f"models: {', '.join(sorted(catalog.served_names))}")
    say(f"key: {layout.STATE}/api-key on {fleet.head.name}; more by `steelyard keys create` there")


def _or_end(failed: dict[str, str]) -> None:
    if failed:
        lines = "\n".join(f"{name}: {why}" for name, why in failed.items())
        raise OperatorError(lines, "mend it and run the same command: it goes on from here")

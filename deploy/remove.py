"""Takes everything of ours off a machine: processes, units, folders, user. Weights and runtimes that were there before stay."""

from __future__ import annotations

from deploy import layout
from deploy.target import Failed, Target


def remove(target: Target) -> None:
    units = target.ask(
        f"ls -d {layout.UNITS}/steelyard-head.service* {layout.UNITS}/steelyard-worker.service* 2>/dev/null"
    ).out
    names = sorted({u.removeprefix(f"{layout.UNITS}/").removesuffix(".d") for u in units})
    for name in names:
        target.run(f"{name} drains and stops", f"systemctl disable --now {name}", timeout_s=3900)
    if target.ask(f"test -e {layout.UNITS}/{layout.UVM}").ok:
        units.append(f"{layout.UNITS}/{layout.UVM}")  # it has no process, and the driver stays as it is
    if units:
        target.run("units removed", f"rm -rf {' '.join(units)} && systemctl daemon-reload")
        target.ask(f"systemctl reset-failed {' '.join(names)} 2>/dev/null || true")
    _no_process(target)
    there = target.ask(f"ls -d {' '.join(layout.EVERYTHING)} 2>/dev/null").out
    if there:
        target.run(f"removed {' '.join(there)}", f"rm -rf {' '.join(there)}")
    if target.ask(f"getent passwd {layout.USER}").ok:
        target.run(f"user {layout.USER} removed", f"userdel {layout.USER}")
    if target.ask(f"getent group {layout.USER}").ok and not (
        target.dry_run and target.ask(f"getent passwd {layout.USER}").ok
    ):
        target.run(f"group {layout.USER} removed", f"groupdel {layout.USER}")


def _no_process(target: Target) -> None:
    """The units' control groups took their processes with them; what the user runs besides is named, not killed."""
    if target.dry_run or not target.ask(f"getent passwd {layout.USER}").ok:
        return
    left = target.ask(f"ps -o pid=,args= -u {layout.USER}")
    if left.ok and left.out:
        raise Failed(
            f"processes of {layout.USER} still run:\n" + "\n".join(f"  {line[:120]}" for line in left.out[:10])
        )

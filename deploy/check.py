"""Before anything changes: every machine examines itself with the doctor, sent over ssh to its own `python3`."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from deploy.inventory import Inventory
from deploy.release import ROOT, Release
from deploy.target import Failed, Fleet, Target
from serving.cli.doctor import FAIL, OK, Finding
from serving.errors import OperatorError

DOCTOR = ROOT / "serving" / "cli" / "doctor.py"


def check(fleet: Fleet, release: Release, console: Console) -> None:
    """Prints what is not well, and raises when a machine cannot be a node."""
    findings: dict[str, list[Finding]] = {}

    def examine(target: Target) -> None:
        findings[target.name] = doctor(target, fleet.inventory, release)

    broken = fleet.each(examine)
    for name, why in broken.items():
        findings[name] = [Finding("doctor", FAIL, why, "it needs python3 (3.9 or newer) and root's rights")]
    everything = [f for found in findings.values() for f in found]
    odd = [f for f in everything if f.level != OK]
    if odd:
        view = Table("machine", "level", "check", "what", "fix", box=None, pad_edge=False)
        for target in fleet.targets:
            for f in findings[target.name]:
                if f.level != OK:
                    view.add_row(target.name, f.level, f.check, f.what, f.fix)
        console.print(view, markup=False)
    failed = sum(f.level == FAIL for f in everything)
    fleet.say(
        f"checked {len(findings)} machines: {len(everything) - len(odd)} ok, {len(odd) - failed} warnings, {failed} failures"
    )
    if failed:
        raise OperatorError("machines are not fit (above)", "mend what failed and run it again; nothing was changed")


def doctor(target: Target, inventory: Inventory, release: Release) -> list[Finding]:
    serve, runtime = inventory.serve, inventory.runtime
    options = [
        *("--json", "--role", target.role, "--profile", serve.profile, "--address", target.machine.address),
        *("--port", str(serve.port), "--ray-port", str(serve.ray_port), "--python", runtime.python),
        *(("--venv", runtime.venv, "--ray", release.ray) if runtime.venv else ()),
    ]
    # The clock is read as late as can be: what the connection takes counts as skew.
    command = f"python3 - {shlex.join(options)} --now {time.time():.3f}"
    said = target.ask(command, stdin=Path(DOCTOR).read_text(), timeout_s=180)
    try:
        told = json.loads(said.out[-1])
        return [Finding(**f) for f in told["findings"]]
    except (IndexError, ValueError, KeyError, TypeError):
        raise Failed(f"the doctor did not finish: {said.why}") from None

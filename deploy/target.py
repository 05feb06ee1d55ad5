"""One machine of the fleet, and how the rooms act on it: `ask` looks, `do` changes and counts. The only user of pyinfra's API.

pyinfra's operations are facts first, then the commands that the difference asks for. In a dry run they stop after the facts. Each
machine is worked on in a greenlet of its own; what one of them fails at is its own failure and is told at the end.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import gevent
from pyinfra.api.command import StringCommand
from pyinfra.api.config import Config
from pyinfra.api.connect import disconnect_all
from pyinfra.api.exceptions import PyinfraError
from pyinfra.api.host import Host
from pyinfra.api.inventory import Inventory as Hosts
from pyinfra.api.operation import OperationMeta, operation
from pyinfra.api.state import State
from pyinfra.context import ctx_host, ctx_state

from deploy.inventory import Inventory, Machine
from serving.errors import OperatorError

Say = Callable[[str], None]


class Failed(Exception):
    """One machine could not be brought where it should be; the text says why."""


@dataclass
class Answer:
    ok: bool
    out: list[str]
    err: list[str]

    @property
    def text(self) -> str:
        return "\n".join(self.out).strip()

    @property
    def why(self) -> str:
        """The last lines it said, for an error."""
        return "\n".join((self.err or self.out)[-12:]).strip() or "it said nothing"


@dataclass
class Target:
    machine: Machine
    role: str
    host: Host
    state: State
    dry_run: bool
    say: Say
    changes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.machine.host

    @property
    def unit(self) -> str:
        return f"steelyard-{self.role}.service"

    def ask(self, command: str, *, stdin: str | None = None, timeout_s: int = 120, show: bool = False) -> Answer:
        """Runs a command as root that changes nothing (or whose change the caller tells). Its output is logged nowhere."""
        arguments: dict[str, Any] = {"_timeout": timeout_s}
        if stdin is not None:
            arguments["_stdin"] = stdin
        if self.state.config.SUDO:
            arguments["_sudo"] = True
        try:
            ok, output = self.host.run_shell_command(StringCommand(command), print_output=show, **arguments)
        except (OSError, PyinfraError, EOFError) as e:
            raise Failed(f"ssh: {e or type(e).__name__}") from None
        except Exception as e:  # paramiko's and gevent's
            raise Failed(f"ssh: {type(e).__name__}: {e}") from None
        return Answer(ok, output.stdout_lines, output.stderr_lines)

    def do(self, what: str, op: Any, *args: Any, **kwargs: Any) -> bool:
        """Applies an operation; True when it changed (or, in a dry run, would change) something."""
        with _listening() as said, ctx_host.use(self.host):
            try:
                meta: OperationMeta = op(*args, name=what, **kwargs)
            except PyinfraError as e:
                raise Failed(f"{what}: {_told(said, self.name) or e or type(e).__name__}") from None
            except OSError as e:
                raise Failed(f"{what}: {e}") from None
            changed = meta.will_change if self.dry_run else meta.did_change()
        if changed:
            self.tell(what)
        return changed

    def run(self, what: str, command: str, *, stdin: str | None = None, timeout_s: int = 600) -> None:
        """A command that changes something each time: call it only when there is something to change."""
        extra: dict[str, Any] = {"_stdin": stdin} if stdin is not None else {}
        self.do(what, command_op, command, _timeout=timeout_s, **extra)

    def tell(self, what: str) -> None:
        self.changes.append(what)
        self.say(f"[{self.name}] {'would: ' if self.dry_run else ''}{what}")


@operation(is_idempotent=False)  # type: ignore[arg-type]
def command_op(command: str) -> Iterable[StringCommand]:
    yield StringCommand(command)


class Fleet:
    """The machines of the inventory (or those named in `only`), connected. Close it."""

    def __init__(self, inventory: Inventory, *, dry_run: bool, say: Say, only: Collection[str] = ()) -> None:
        self.inventory, self.dry_run, self.say = inventory, dry_run, say
        machines = [m for m in inventory.machines if not only or m.host in only]
        sudo = any((m.user or inventory.ssh.user) != "root" for m in machines)
        # A machine that fails does not stop the others; the flow decides after each step.
        config = Config(CONNECT_TIMEOUT=15, FAIL_PERCENT=100, SUDO=sudo)  # type: ignore[no-untyped-call]
        hosts = Hosts(([(m.host, _ssh_data(inventory, m)) for m in machines], {}))  # type: ignore[no-untyped-call]
        self._state = State(hosts, config, check_for_changes=dry_run)
        ctx_state.set(self._state)  # type: ignore[no-untyped-call]  # one for the process; the host is each greenlet's own
        self.targets = []
        for machine in machines:
            role = "head" if machine is inventory.head else "worker"
            host = hosts.get_host(machine.host)
            assert host is not None
            self.targets.append(Target(machine, role, host, self._state, dry_run, say))

    @property
    def head(self) -> Target:
        return self.targets[0]

    def connect(self) -> None:
        """Connects to all, or says which machines do not answer and why."""
        lost: dict[str, str] = {}

        def one(target: Target) -> None:
            try:
                target.host.connect(show_errors=False, raise_exceptions=True)
            except Exception as e:  # pyinfra's, paramiko's and the sockets' own
                lost[target.name] = _hint(" ".join(str(e).split()) or type(e).__name__)
            else:
                self._state.activate_host(target.host)

        with _listening():
            gevent.joinall([gevent.spawn(one, t) for t in self.targets], raise_error=True)
        if lost:
            lines = "\n".join(f"  {name}: {why}" for name, why in sorted(lost.items()))
            raise OperatorError(
                f"no ssh to {len(lost)} of {len(self.targets)} machines\n{lines}", "nothing was changed"
            )
        # Operations act when they are called, each machine at its own pace; a dry run stays at their facts.
        self._state.is_executing = not self.dry_run

    def close(self) -> None:
        disconnect_all(self._state)
        for target in self.targets:
            if client := getattr(target.host.connector, "client", None):
                client.close()

    def each(self, work: Callable[[Target], None], targets: list[Target] | None = None) -> dict[str, str]:
        """Does `work` on all at the same time: the machines that failed, and why."""
        failed: dict[str, str] = {}

        def one(target: Target) -> None:
            try:
                work(target)
            except Failed as e:
                failed[target.name] = str(e)

        jobs = [gevent.spawn(one, t) for t in (self.targets if targets is None else targets)]
        gevent.joinall(jobs, raise_error=True)
        return failed

    @property
    def changes(self) -> int:
        return sum(len(t.changes) for t in self.targets)


def _ssh_data(inventory: Inventory, machine: Machine) -> dict[str, Any]:
    ssh = inventory.ssh
    key = machine.key or ssh.key
    data: dict[str, Any] = {
        "ssh_user": machine.user or ssh.user,
        "ssh_port": machine.port or ssh.port,
        "ssh_strict_host_key_checking": "yes" if ssh.host_keys == "strict" else "accept-new",
    }
    if key:
        data["ssh_key"] = str(key.expanduser())
    if ssh.known_hosts:
        data["ssh_known_hosts_file"] = str(ssh.known_hosts)
    return data


class _listening(logging.Handler):
    """What pyinfra says is an error's text here, not console noise. It never logs what goes to a command's stdin."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> list[str]:
        logging.getLogger("paramiko").setLevel(logging.CRITICAL)  # its tracebacks; the error itself is told
        logger = logging.getLogger("pyinfra")
        logger.propagate = False
        logger.addHandler(self)
        return self.lines

    def __exit__(self, *_: object) -> None:
        logging.getLogger("pyinfra").removeHandler(self)


def _told(lines: list[str], name: str) -> str:
    mine = [line.partition("]")[2].strip() for line in lines if line.startswith(f"[{name}]")]
    return "\n".join([line.removeprefix("nested").strip() for line in mine if "Error: executed" not in line][-12:])


def _hint(told: str) -> str:
    if "host key" in told.lower():
        return f"{told}; connect once by hand with ssh and compare its fingerprint, or set ssh.host_keys to accept-new"
    return told

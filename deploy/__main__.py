"""`python -m deploy deploy|upgrade|remove INVENTORY`; the Makefile's targets call it."""

from gevent import monkey

monkey.patch_all()  # pyinfra works on all machines at once with it; before anything else is imported

import argparse  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

from pyinfra.api.output import set_echo  # noqa: E402
from rich.console import Console  # noqa: E402

from deploy import deploy as flows  # noqa: E402
from deploy import inventory  # noqa: E402
from serving.errors import OperatorError  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(prog="deploy", description="Machines of an inventory as one serving cluster.")
    parser.add_argument("verb", choices=["deploy", "upgrade", "remove"])
    parser.add_argument("inventory", nargs="?", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="tell what would change")
    parser.add_argument("--downtime", action="store_true", help="upgrade: stop all machines, then start all")
    parser.add_argument("--limit", default="", help="remove: only these machines, with commas between")
    parser.add_argument("--yes", action="store_true", help="remove: do not ask")
    given = parser.parse_intermixed_args()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 220)
    set_echo(lambda message="", **_: print(message, flush=True))
    try:
        wanted = inventory.load(given.inventory)
        if given.verb == "deploy":
            flows.deploy(wanted, dry_run=given.dry_run, console=console, say=say)
        elif given.verb == "upgrade":
            flows.upgrade(wanted, dry_run=given.dry_run, downtime=given.downtime, console=console, say=say)
        else:
            limit = [name.strip() for name in given.limit.split(",") if name.strip()]
            changes = flows.remove(
                wanted,
                limit=limit,
                dry_run=given.dry_run,
                confirm=lambda question: given.yes or asked(question),
                say=say,
            )
            say(f"{changes} changes" + (" would be made; nothing was changed" if given.dry_run else ""))
    except OperatorError as e:
        print(f"error: {e}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("stopped; run the same command again: it goes on from here", file=sys.stderr, flush=True)
        return 130
    return 0


def say(line: str) -> None:
    print(line, flush=True)


def asked(question: str) -> bool:
    if not sys.stdin.isatty():
        raise OperatorError("remove asks first, and there is nobody to ask", "give YES=1")
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")


if __name__ == "__main__":
    sys.exit(main())

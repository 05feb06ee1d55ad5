"""`steelyard keys`: make, list and revoke API keys of this node's keys file."""

from __future__ import annotations

import json
import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from serving.cli.term import one_line_errors, show
from serving.errors import OperatorError
from serving.gateway.keys import OPTIONS, Key, as_record, create_key, list_keys, revoke_key

app = typer.Typer(help="API keys: make, list, revoke.", no_args_is_help=True)

File = Annotated[Path | None, typer.Option("--file", help="Keys file; by default the one of this node's state folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_UNITS_S = {"m": 60, "h": 3600, "d": 86400, "w": 604800}


def parse_duration(text: str) -> float:
    """Seconds of `90m`, `12h`, `30d` or `8w`, at most ten years. Raises OperatorError for anything else."""
    found = re.fullmatch(r"([0-9]{1,7})([mhdw])", text)
    seconds = int(found[1]) * _UNITS_S[found[2]] if found else 0
    if not 0 < seconds <= 10 * 366 * 86400:
        raise OperatorError(f"{text!r} is no duration", "Write 90m, 12h, 30d or 8w, at most ten years")
    return float(seconds)


@app.command()
def create(
    name: Annotated[str, typer.Option(help="Who or what uses the key.")],
    scope: Annotated[
        list[str], typer.Option(help="infer:MODEL, infer:MODEL@VERSION, infer:*, metrics, admin, trace. Repeat.")
    ],
    expires: Annotated[str | None, typer.Option(help="Lifetime: 90m, 12h, 30d, 8w. Without it: no end.")] = None,
    weight: Annotated[
        int | None, typer.Option(help="Its part of a busy model, against other keys; 1 without it.")
    ] = None,
    class_: Annotated[
        str, typer.Option("--class", help="Highest class of its requests: interactive, default or batch.")
    ] = "default",
    max_concurrent: Annotated[int | None, typer.Option(help="Requests at once, waiting ones included.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="Tokens a minute, of prompts and answers.")] = None,
    max_body_bytes: Annotated[int | None, typer.Option(help="Size of one request.")] = None,
    keep_alive: Annotated[
        bool,
        typer.Option(
            "--keep-alive/--no-keep-alive",
            help="In streams that are held long. Without them a request that fails after a long wait has its own status.",
        ),
    ] = True,
    file: File = None,
    as_json: Json = False,
) -> None:
    """Make a key. Its token is printed once and kept nowhere."""
    with one_line_errors():
        now = time.time()
        expires_at = None if expires is None else now + parse_duration(expires)
        key, token = create_key(
            _keys_file(file, write=True),
            name=name,
            scopes=scope,
            now=now,
            expires_at=expires_at,
            class_=class_,
            keep_alive=keep_alive,
            weight=weight,
            max_concurrent=max_concurrent,
            tokens_per_minute=tokens_per_minute,
            max_body_bytes=max_body_bytes,
        )
        if as_json:
            print(json.dumps({**as_record(key), "token": token}))
            return
        # The token alone on stdout, so that `KEY=$(steelyard keys create ...)` works.
        notes = Console(stderr=True, highlight=False)
        notes.print(f"key {key.id} for {key.name}: {', '.join(sorted(key.scopes))}; {_state(key, now)}", markup=False)
        print(token)
        notes.print("Keep it now: it is not shown again.")


@app.command("list")
def list_(file: File = None, as_json: Json = False) -> None:
    """Show every key, without secrets."""
    with one_line_errors():
        now = time.time()
        keys = list_keys(_keys_file(file))
        if as_json:
            print(json.dumps([{**as_record(key), "state": _state(key, now).split()[0]} for key in keys]))
            return
        table = Table("id", "name", "scopes", "made", "state", box=None, pad_edge=False)
        for key in keys:
            table.add_row(
                key.id,
                _plain(key.name),
                " ".join(sorted(key.scopes)),
                _day(key.created_at),
                f"{_state(key, now)}{_options(key)}",
            )
        show(table)


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="The eight characters that `keys list` shows.")],
    file: File = None,
) -> None:
    """Refuse a key from now on. Gateways notice within seconds."""
    with one_line_errors():
        key = revoke_key(_keys_file(file, write=True), key_id, time.time())
        Console(highlight=False).print(f"revoked {key.id} ({key.name})", markup=False)


def _keys_file(given: Path | None, *, write: bool = False) -> Path:
    if given is not None:
        return given
    # Here, so that `--help` and `--file` do not need valid settings.
    from serving.cli.cluster import read_cluster_file
    from serving.settings import load_settings

    settings = load_settings()
    if write and settings.managed_by:
        raise OperatorError(
            f"the keys of this pod come from a Secret ({settings.keys_file})",
            "Change a copy with --file and put it into the Secret; gateways notice within minutes",
        )
    running = read_cluster_file(settings)
    if running is not None and running.role == "worker":
        raise OperatorError("this node is a worker", f"Make and revoke keys on the head ({running.address})")
    return settings.keys_file


def _state(key: Key, now: float) -> str:
    if key.revoked_at is not None:
        return f"revoked {_day(key.revoked_at)}"
    if key.expires_at is None:
        return "active"
    return f"{'active until' if now < key.expires_at else 'expired'} {_day(key.expires_at)}"


def _options(key: Key) -> str:
    """What is not as every key has it."""
    record, plain = as_record(key), {"class": "default", "weight": 1}
    said = [f"{name} {record[name]}" for name in ("class", *OPTIONS) if record[name] != plain.get(name)]
    return "".join(f", {option}" for option in [*said, *([] if key.keep_alive else ["no keep-alive"])])


def _day(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _plain(text: str) -> str:
    return text.replace("[", r"\[")

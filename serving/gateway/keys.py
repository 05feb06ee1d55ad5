"""API keys: who may ask for what. One JSON file, hashed secrets, no database.

A token is `sk-steelyard-<8 hex id>-<43 characters>`. The secret part is 256 random bits, so one SHA-256 keeps it at
rest: slow password hashes protect guessable secrets, and this one cannot be guessed. The id is public (logs, `revoke`).

A key may have options: its class and weight among those that wait, limits of its own (`OPTIONS`), and whether streams that are
held long get keep-alives.

Scopes: `infer:*`, `infer:<model>` (all its versions and adapters), `infer:<model>@<version>`, `metrics`, `admin`, `trace` (its
requests are traced when their `traceparent` says so). None implies another. Times are epoch seconds in memory, UTC ISO 8601
in the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import hmac
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from serving import files
from serving.catalog.spec import NAME, VERSION
from serving.errors import InvalidKey, OperatorError
from serving.gateway.order import CLASSES
from serving.settings import readable_by_others

_TOKEN = re.compile(r"sk-steelyard-([0-9a-f]{8})-[A-Za-z0-9_-]{43}", re.ASCII)
_SCOPE = re.compile(rf"metrics|admin|trace|infer:(\*|{NAME}(@{VERSION})?)", re.ASCII)
_NO_DIGEST = "0" * 64
LOCK_S = 30.0
_MAX_FILE_BYTES = 16 * 1024 * 1024
_REFUSED = (
    "no valid API key: send `Authorization: Bearer sk-steelyard-...`; unknown, expired and revoked keys are refused"
)

# Options of a key, as the file names them, with the bounds of the numbers; `class` is one of `CLASSES`.
OPTIONS: Mapping[str, tuple[int, int]] = {
    "weight": (1, 1000),
    "max_concurrent": (1, 1_000_000),
    "tokens_per_minute": (1, 10**12),
    "max_body_bytes": (1024, 1024**3),
}

Signature = tuple[int, int, int] | None


@dataclass(frozen=True, slots=True)
class Key:
    """One record. The secret is not in it."""

    id: str
    name: str
    sha256: str
    scopes: frozenset[str]
    created_at: float
    expires_at: float | None = None
    revoked_at: float | None = None
    weight: int = 1  # its part of a contended model, against other keys of its class
    class_: str = "default"  # the highest that its requests can have
    max_concurrent: int | None = None  # requests inside, waiting or running
    tokens_per_minute: int | None = None
    max_body_bytes: int | None = None
    keep_alive: bool = True  # in streams that are held long; without, a failure keeps its status

    def allows(self, scope: str) -> bool:
        """Whether the key covers `metrics`, `admin`, `trace`, `infer:<model>` or `infer:<model>@<version>`.

        Adapters have no scope of their own: ask for the model they belong to.
        """
        if scope in self.scopes:
            return True
        if not scope.startswith("infer:"):
            return False
        return "infer:*" in self.scopes or scope.partition("@")[0] in self.scopes

    def good(self, now: float) -> bool:
        """Neither revoked nor expired at `now`."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


_NOBODY = Key(id="", name="", sha256=_NO_DIGEST, scopes=frozenset(), created_at=0, revoked_at=0)


class KeyRing:
    """The keys of one file, in memory, for one gateway. Raises OperatorError when the first read fails."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._keys, self._seen = _read(path)

    def check(self, token: str | None, now: float) -> Key:
        """The key of `token`. Raises InvalidKey with one sentence for every reason.

        A malformed token and an unknown id cost the same hash and comparison as a wrong secret, so that the time of
        the answer does not tell which ids exist.
        """
        text = token or ""
        form = _TOKEN.fullmatch(text)
        key = self._keys.get(form[1], _NOBODY) if form else _NOBODY
        same = hmac.compare_digest(_digest(text), key.sha256)
        if not (same and key.good(now)):
            raise InvalidKey(_REFUSED)
        return key

    def reload_if_changed(self) -> OperatorError | None:
        """Read the file again if it was replaced; one `stat` when it was not.

        A file that cannot be used leaves the last good keys in place: the reason is returned once, for the log.
        """
        seen = _signature(self._path)
        if seen == self._seen:
            return None
        try:
            self._keys, self._seen = _read(self._path)
        except OperatorError as error:
            self._seen = seen
            return error
        return None

    def take(self, content: bytes) -> None:
        """The keys of another node's file, in force from now on, whether or not they can be written down here. Raises
        OperatorError, and keeps the last good keys, when `content` is no keys file."""
        self._keys = _keys_of(content, "the head's keys file")

    def expiries(self, count: int, now: float) -> dict[str, float]:
        """Key id -> epoch seconds, of the `count` keys that expire the soonest; those that did within a day among them, as
        their users may only notice now. Revoked ones are no news."""
        ending = [
            (k.expires_at, k.id)
            for k in self._keys.values()
            if k.expires_at is not None and k.revoked_at is None and k.expires_at > now - 86400
        ]
        return {key_id: at for at, key_id in heapq.nsmallest(count, ending)}

    def __len__(self) -> int:
        return len(self._keys)


def adopt(path: Path, content: bytes) -> bool:
    """Make `path` hold the keys file of another node; True when it was another one before. Gateways see it at their next
    reload. Raises OperatorError, and leaves the old file, when `content` is no keys file."""
    _keys_of(content, "the head's keys file")
    with contextlib.suppress(OSError):
        if path.read_bytes() == content:
            return False
    files.replace(path, content)
    return True


def create_key(
    path: Path,
    *,
    name: str,
    scopes: Iterable[str],
    now: float,
    expires_at: float | None = None,
    class_: str = "default",
    keep_alive: bool = True,
    **numbers: int | None,
) -> tuple[Key, str]:
    """Add a key to the file (made when it is not there). Returns it with its token, which is never shown again. `numbers`
    are of `OPTIONS`; None is the default."""
    wanted = frozenset(scopes)
    if not (1 <= len(name) <= 64 and name.isprintable()):
        raise OperatorError(f"{name!r} cannot name a key", "Use 1 to 64 printable characters")
    if not wanted:
        raise OperatorError("a key needs a scope", "Give infer:<model>, infer:*, metrics, admin or trace")
    for scope in sorted(wanted):
        if not _SCOPE.fullmatch(scope):
            raise OperatorError(
                f"{scope!r} is no scope",
                "Give infer:<model>, infer:<model>@<version>, infer:*, metrics, admin or trace",
            )
    if expires_at is not None and expires_at <= now:
        raise OperatorError("the key would be expired already", "Give an expiry in the future")
    given = {k: v for k, v in numbers.items() if v is not None}
    try:
        _check_options(class_, given)
    except ValueError as wrong:
        raise OperatorError(str(wrong)) from None

    made: list[tuple[Key, str]] = []

    def add(keys: dict[str, Key]) -> None:
        while (key_id := secrets.token_hex(4)) in keys:
            pass
        token = f"sk-steelyard-{key_id}-{secrets.token_urlsafe(32)}"
        keys[key_id] = Key(
            key_id, name, _digest(token), wanted, now, expires_at, class_=class_, keep_alive=keep_alive, **given
        )
        made.append((keys[key_id], token))

    _change(path, add)
    return made[0]


def list_keys(path: Path) -> list[Key]:
    """Every key of the file, oldest first, revoked and expired ones included."""
    return sorted(_read(path)[0].values(), key=lambda key: (key.created_at, key.id))


def revoke_key(path: Path, key_id: str, now: float) -> Key:
    """Refuse the key from now on; gateways see it at their next reload. Revoking twice keeps the first time."""

    def revoke(keys: dict[str, Key]) -> None:
        if key_id not in keys:
            raise OperatorError(f"no key has the id {key_id!r}", "`steelyard keys list` shows the ids")
        if keys[key_id].revoked_at is None:
            keys[key_id] = replace(keys[key_id], revoked_at=now)

    return _change(path, revoke)[key_id]


def as_record(key: Key) -> dict[str, Any]:
    """The key as the file holds it, without the hash: fit for `--json`."""
    return {
        "id": key.id,
        "name": key.name,
        "scopes": sorted(key.scopes),
        "created_at": _iso(key.created_at),
        "expires_at": _iso(key.expires_at),
        "revoked_at": _iso(key.revoked_at),
        "class": key.class_,
        "keep_alive": key.keep_alive,
        **{name: getattr(key, name) for name in OPTIONS},
    }


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "backslashreplace")).hexdigest()


def _signature(path: Path) -> Signature:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _read(path: Path) -> tuple[dict[str, Key], Signature]:
    """Keys and signature of one and the same file, even when it is replaced meanwhile."""
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            if readable_by_others(found):
                raise OperatorError(f"{path} can be read by others", f"Run `chmod 600 {path}`")
            raw = file.read(_MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise OperatorError(
            f"there is no keys file {path}", "Make the first key with `steelyard keys create`"
        ) from None
    except OSError as cause:
        raise OperatorError(f"cannot read the keys file {path}: {cause.strerror}") from None
    return _keys_of(raw, f"the keys file {path}"), (found.st_mtime_ns, found.st_size, found.st_ino)


def _keys_of(raw: bytes, where: str) -> dict[str, Key]:
    try:
        if len(raw) > _MAX_FILE_BYTES:
            raise ValueError("too large")
        keys = [_parse(record) for record in json.loads(raw)["keys"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as cause:
        why = f"{type(cause).__name__}: {cause}"[:120]
        raise OperatorError(f"{where} is damaged ({why})", "Restore it from a backup") from None
    return {key.id: key for key in keys}


def _parse(record: dict[str, Any]) -> Key:
    if not re.fullmatch(r"[0-9a-f]{8}", record["id"]) or not re.fullmatch(r"[0-9a-f]{64}", record["sha256"]):
        raise ValueError("bad id or hash")
    scopes = record["scopes"]
    if not isinstance(scopes, list) or not all(_SCOPE.fullmatch(scope) for scope in scopes):
        raise ValueError(f"bad scopes of key {record['id']}")
    created = _epoch(record["created_at"])
    if created is None:
        raise ValueError(f"no creation time of key {record['id']}")
    keep_alive = record.get("keep_alive", True)
    if not isinstance(keep_alive, bool):
        raise ValueError(f"keep_alive of key {record['id']} is not true or false")
    numbers = {name: record[name] for name in OPTIONS if record.get(name) is not None}
    # `expires_at` and `revoked_at` must be there: a record cut by hand must not become a key that lives for ever.
    return Key(
        id=record["id"],
        name=str(record["name"]),
        sha256=record["sha256"],
        scopes=frozenset(scopes),
        created_at=created,
        expires_at=_epoch(record["expires_at"]),
        revoked_at=_epoch(record["revoked_at"]),
        # Absent in files of earlier versions.
        class_=_check_options(record.get("class", "default"), numbers),
        keep_alive=keep_alive,
        **numbers,
    )


def _check_options(class_: str, numbers: Mapping[str, int]) -> str:
    """The class; ValueError for an option that cannot be."""
    if class_ not in CLASSES:
        raise ValueError(f"{class_!r} is no class: use {', '.join(CLASSES)}")
    for name, value in numbers.items():
        low, high = OPTIONS[name]
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"{name} is a whole number from {low} to {high}, not {value!r}")
    return class_


def _change(path: Path, change: Callable[[dict[str, Key]], None]) -> dict[str, Key]:
    """Read, change and replace the file under its lock. Readers see the old file or the new one, never a half."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = FileLock(f"{path}.lock", timeout=LOCK_S, mode=0o600)
    try:
        held = lock.acquire()
    except Timeout:
        raise OperatorError(f"{lock.lock_file} is held by another command", "Try again when it is done") from None
    with held:
        keys = _read(path)[0] if path.exists() else {}
        change(keys)
        records = [{**as_record(key), "sha256": key.sha256} for key in keys.values()]
        files.replace(path, (json.dumps({"keys": records}, indent=1) + "\n").encode())
    return keys


def _iso(at: float | None) -> str | None:
    return None if at is None else datetime.fromtimestamp(at, UTC).isoformat().replace("+00:00", "Z")


def _epoch(text: str | None) -> float | None:
    if text is None:
        return None
    at = datetime.fromisoformat(text)
    if at.tzinfo is None:
        raise ValueError(f"{text} has no time zone")
    return at.timestamp()

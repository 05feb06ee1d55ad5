"""The inventory: which machines, how to reach them, what they shall serve. A Python file with five names; see
`inventory.example.py`. Every mistake is one OperatorError naming the file and the key, before any machine is touched."""

from __future__ import annotations

import ipaddress
import re
import runpy
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from serving.errors import OperatorError
from serving.settings import collector_url

NAMES = ("head", "workers", "ssh", "runtime", "serve")
# What the deploy sets itself: a second value would be ignored, or break the cluster.
_OWN = re.compile(r"STEELYARD_|RAY_|PYTHON|LD_PRELOAD$|PATH$|HOME$|TMPDIR$|XDG_CACHE_HOME$")
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|CREDENTIAL", re.IGNORECASE)
_HIDDEN = ("/home/", "/root/", "/run/user/")


class Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Ssh(Spec):
    """How every machine is reached; a host may override user, port and key."""

    user: str = "root"  # another user needs sudo without a password
    port: int = Field(22, ge=1, le=65535)
    key: Path | None = None  # by default the agent's keys and those in ~/.ssh
    known_hosts: Path | None = None  # by default ~/.ssh/known_hosts
    host_keys: Literal["strict", "accept-new"] = "strict"  # secrets travel this way: unknown machines are refused

    @model_validator(mode="after")
    def _files(self) -> Self:
        for name in ("key", "known_hosts"):
            path = getattr(self, name)
            if path is not None and not path.is_file():
                raise ValueError(f"{name} {path}: no such file")
        return self


class Machine(Spec):
    host: str  # what ssh connects to; a name of ~/.ssh/config is fine
    address: str = ""  # the machine's IP address in the cluster's network; by default `host`, when that is one
    user: str | None = None
    port: int | None = Field(None, ge=1, le=65535)
    key: Path | None = None
    labels: dict[str, str] = {}  # what `placement.labels` of a model file asks for

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, given: Any) -> Any:
        return {"host": given} if isinstance(given, str) else given

    @field_validator("key")
    @classmethod
    def _key(cls, key: Path | None) -> Path | None:
        if key is not None and not key.expanduser().is_file():
            raise ValueError(f"{key}: no such file")
        return key

    @model_validator(mode="after")
    def _address(self) -> Self:
        try:
            address = ipaddress.ip_address(self.address or self.host)
        except ValueError:
            wrong = f"{self.address!r} is no IP address" if self.address else f"{self.host!r} is a name"
            raise ValueError(f"{wrong}: give the machine's IP address in the cluster's network as `address`") from None
        if address.is_loopback or address.is_unspecified or address.is_multicast:
            raise ValueError(f"{address} is not an address that other machines can reach")
        object.__setattr__(self, "address", str(address))
        return self

    @field_validator("labels")
    @classmethod
    def _labels(cls, labels: dict[str, str]) -> dict[str, str]:
        for text in [*labels, *labels.values()]:
            if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?", text):
                raise ValueError(f"label {text!r}: letters, digits, dots, dashes; at most 63")
        return labels


class Runtime(Spec):
    """Where the Python environment of every machine comes from: the lock file, or one that is there already."""

    python: str = "python3.11"  # makes the environment
    wheelhouse: Path | None = None  # folder of wheels on this machine (`make wheelhouse`), for racks without an index
    venv: str | None = None  # an environment that is on every machine already; nothing is installed then

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.venv is not None and self.wheelhouse is not None:
            raise ValueError("give `venv` or `wheelhouse`, not both")
        if self.venv is not None and not re.fullmatch(r"/[A-Za-z0-9._/+-]+", self.venv):
            raise ValueError(f"venv {self.venv!r}: an absolute path on the machines, without spaces")
        if self.venv is not None and self.venv.startswith(("/opt/steelyard", "/var/lib/steelyard", *_HIDDEN)):
            raise ValueError(f"venv {self.venv}: outside /opt/steelyard and home folders, which the units cannot see")
        if not re.fullmatch(r"[A-Za-z0-9._/+-]+", self.python):
            raise ValueError(f"python {self.python!r}: a command or path, without spaces")
        if self.wheelhouse is not None and not list(self.wheelhouse.glob("*.whl")):
            raise ValueError(f"wheelhouse {self.wheelhouse} has no wheel; make one with `make wheelhouse`")
        return self


class Serve(Spec):
    models: Path = Path("models")  # the catalog: a folder of model files on this machine
    profile: Literal["cpu", "gpu", "sim"] = "gpu"
    listen: str = "node"  # the gateways' address: "node" for each machine's own, or 0.0.0.0
    port: int = Field(8000, ge=1024, le=65535)
    gateways: int = Field(1, ge=1, le=64)  # on each machine
    ray_port: int = Field(6379, ge=1024, le=65535)  # the head's control store
    environment: dict[str, str] = {}  # for engines, e.g. NCCL_SOCKET_IFNAME; no secrets: every process sees it
    ready_timeout_s: int = Field(1800, ge=10, le=86400)  # longest wait for every model
    drain_s: int = Field(45, ge=0, le=3600)  # a stopping machine's requests in progress get so long
    redis: str | None = None  # HOST:PORT: the control store lives there instead of on the head's disk
    cluster_name: str = ""  # keeps clusters of one Redis apart; by default a digest of the cluster secret
    redis_username: str = ""
    redis_password: Path | None = None  # file on this machine
    otlp_endpoint: str | None = None  # traces go to this collector, by OTLP over HTTP: http://10.0.0.5:4318
    otlp_headers: Path | None = None  # file on this machine with what it asks for, a `name: value` on each line
    trace_ratio: float = Field(0.1, ge=0, le=1)  # share of requests that are traced

    @field_validator("listen")
    @classmethod
    def _listen(cls, listen: str) -> str:
        if listen not in ("node", "0.0.0.0", "::"):
            raise ValueError(f"{listen!r}: write node (each machine's own address) or 0.0.0.0")
        return listen

    @model_validator(mode="after")
    def _redis(self) -> Self:
        if self.redis is not None and not re.fullmatch(r"[A-Za-z0-9.\[\]:-]+:[0-9]{1,5}", self.redis):
            raise ValueError(f"redis {self.redis!r} is no HOST:PORT")
        if self.redis is None and (self.redis_username or self.redis_password or self.cluster_name):
            raise ValueError("redis_username, redis_password and cluster_name need `redis`")
        if not re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]{0,62})?", self.cluster_name):
            raise ValueError(f"cluster_name {self.cluster_name!r}: letters, digits, dots, dashes; at most 63")
        if self.redis_password is not None and not self.redis_password.is_file():
            raise ValueError(f"redis_password {self.redis_password}: no such file")
        if not re.fullmatch(r"[A-Za-z0-9._-]*", self.redis_username):
            raise ValueError(f"redis_username {self.redis_username!r}: letters, digits, dots, dashes")
        return self

    @model_validator(mode="after")
    def _tracing(self) -> Self:
        if self.otlp_endpoint is not None:
            collector_url(self.otlp_endpoint)
        elif self.otlp_headers is not None:
            raise ValueError("otlp_headers needs `otlp_endpoint`")
        if self.otlp_headers is not None and not self.otlp_headers.is_file():
            raise ValueError(f"otlp_headers {self.otlp_headers}: no such file")
        return self

    @field_validator("environment")
    @classmethod
    def _environment(cls, environment: dict[str, str]) -> dict[str, str]:
        for name, value in environment.items():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"{name!r} is no name of a variable")
            if _OWN.match(name):
                raise ValueError(f"{name} is set by the deploy")
            if _SECRET.search(name):
                raise ValueError(
                    f"{name} looks like a secret: this file and the units' environment are no place for one"
                )
            if not value.isprintable() or set(value) & set("'\"\\$`"):
                raise ValueError(f"{name}: one line without quotes, backslashes or dollars")
        return environment


class Inventory(Spec):
    head: Machine
    workers: tuple[Machine, ...] = ()
    ssh: Ssh = Ssh()  # type: ignore[call-arg]
    runtime: Runtime = Runtime()
    serve: Serve = Serve()  # type: ignore[call-arg]

    @property
    def machines(self) -> tuple[Machine, ...]:
        return (self.head, *self.workers)

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        for what in ("host", "address"):
            seen: set[str] = set()
            for machine in self.machines:
                value = getattr(machine, what)
                if value in seen:
                    raise ValueError(f"{what} {value} stands there twice; the head must not be among the workers")
                seen.add(value)
        if self.serve.port == self.serve.ray_port:
            raise ValueError(f"serve.port and serve.ray_port are both {self.serve.port}")
        return self


def load(path: Path | None) -> Inventory:
    """The inventory in `path`; relative paths in it start at its folder."""
    if path is None:
        raise OperatorError("no inventory", "copy deploy/inventory.example.py, and give it as INVENTORY=FILE")
    if not path.is_file():
        raise OperatorError(f"{path}: no such file", "give your inventory as INVENTORY=FILE")
    try:
        names = runpy.run_path(str(path))
    except Exception as e:
        line = f" (line {e.lineno})" if isinstance(e, SyntaxError) else ""
        raise OperatorError(f"{path}{line}: {type(e).__name__}: {e}", "it is a Python file") from None
    given = {k: v for k, v in names.items() if k in NAMES}
    unknown = sorted(
        k for k in names if k not in NAMES and not k.startswith("_") and isinstance(names[k], dict | list | str)
    )
    if unknown:
        raise OperatorError(f"{path}: unknown name {unknown[0]}", f"the names are {', '.join(NAMES)}")
    if "head" not in given:
        raise OperatorError(f"{path}: no `head`", 'write e.g. head = "10.0.0.10"')
    try:
        return Inventory.model_validate(_at(path.resolve().parent, given))
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(p) for p in first["loc"]) or "inventory"
        told = first["msg"].removeprefix("Value error, ")
        more = f" (and {e.error_count() - 1} more)" if e.error_count() > 1 else ""
        raise OperatorError(f"{path}: {where}: {told}{more}", "correct it; nothing was changed") from None


_PATHS = {
    "ssh": ("key", "known_hosts"),
    "runtime": ("wheelhouse",),
    "serve": ("models", "redis_password", "otlp_headers"),
}


def _at(folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    for section, keys in _PATHS.items():
        inner = given.get(section)
        if isinstance(inner, dict):
            found = {k: folder / Path(inner[k]).expanduser() for k in keys if isinstance(inner.get(k), str)}
            given = {**given, section: {**inner, **found}}
    if "models" not in given.get("serve", {}):
        given = {**given, "serve": {**given.get("serve", {}), "models": folder / "models"}}
    return given

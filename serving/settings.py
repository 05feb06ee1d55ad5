"""The only reader of the environment. Every variable is `STEELYARD_<FIELD>`; a bad value stops start-up naming it.

(The two files that run inside an engine's process, `engine/door.py` and `engine/guard/sitecustomize.py`, read the
few variables that the engine's supervisor sets for them: they may import the standard library only.)
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from serving.errors import OperatorError

Profile = Literal["cpu", "gpu", "sim"]
Role = Literal["one", "head", "worker"]


# Of a name, RFC 9110's tokens; of a value, what a header may hold.
_HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?)[ \t]*")
_TRACES_PATH = "/v1/traces"


def collector_url(url: str) -> str:
    """Where traces go, of a collector's base URL, as OTEL_EXPORTER_OTLP_ENDPOINT has it, or of that. Raises ValueError."""
    parts = urlsplit(url)
    if parts.username is not None or parts.password is not None:
        raise ValueError("no user or password in it: a collector's secret is a header, in a file")
    if not parts.hostname or not re.fullmatch(r"https?://[A-Za-z0-9._~%:/\[\]-]+", url):
        raise ValueError("it is no URL of a collector, like http://collector:4318")
    parts.port  # noqa: B018 - ValueError when it is no port
    return url.rstrip("/").removesuffix(_TRACES_PATH) + _TRACES_PATH


class Settings(BaseSettings):
    """One node's settings, frozen. Defaults live here and nowhere else."""

    model_config = SettingsConfigDict(env_prefix="STEELYARD_", frozen=True, extra="ignore", env_ignore_empty=True)

    state_dir: Path = Field(Path(".steelyard"), description="keys, secrets, pid, logs and bench results of this node")
    cache_dir: Path = Field(Path("~/.cache/steelyard"), description="weights built or fetched, and engine probes")
    models: str = Field("models", description="catalog: a folder of YAML files, one file, or a comma list")
    profile: Profile | None = Field(None, description="cpu, gpu or sim; by default gpu when NVML sees one, else cpu")
    host: str = Field("127.0.0.1", description="address the gateways listen on")
    port: int = Field(8000, ge=1, le=65535, description="port the gateways listen on")
    nvml_script: str | None = Field(
        None, description="profile sim: GPUs that follow a script, one of h200x8, h200x8-mig, a100x8, or a YAML file"
    )
    gateways: int = Field(1, ge=1, le=64, description="gateway replicas on each node, all on the same port")
    cluster_secret: SecretStr | None = Field(None, description="secret between gateways and engines")
    cluster_secret_file: Path | None = Field(None, description="file holding it; default STATE_DIR/cluster-secret")
    api_keys_file: Path | None = Field(None, description="file of the API keys; default STATE_DIR/keys.json")
    managed_by: Literal["rayservice"] | None = Field(None, description="who alone may change what is served here")
    runtime_dir: Path | None = Field(None, description="private folder for engines' sockets; short, on a local disk")
    ray_address: str | None = Field(None, description="join this Ray cluster instead of starting one")
    ready_timeout_s: float = Field(1800, gt=0, description="longest wait of `up` for every model to be ready")
    node_role: Role = Field("one", description="what this node is; `steelyard node` sets it for its own processes")
    node_address: str | None = Field(None, description="this node's IP address in the cluster")
    ray_port: int = Field(6379, ge=1, le=65535, description="port of the head's control store")
    head: str | None = Field(None, description="HOST:PORT of the head's control store, on workers")
    head_wait_s: float = Field(600, gt=0, description="longest wait of a worker for its head before it exits")
    head_runs_engines: bool | None = Field(None, description="by default when the profile is gpu and the head has GPUs")
    node_labels: str = Field("", description="this node's labels for `placement.labels`: region=eu,rack=7")
    node_drain_s: float = Field(45, ge=0, description="longest wait of a stopping node for its requests in progress")
    redis: str | None = Field(
        None, description="keep the control store in this Redis (HOST:PORT), not in STATE_DIR/gcs"
    )
    cluster_name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$",
        description="keeps clusters of one Redis apart; by default a digest of the cluster secret",
    )
    redis_username: str = Field("", description="of that Redis")
    redis_password_file: Path | None = Field(None, description="file holding the password of that Redis (mode 0600)")
    otlp_endpoint: Annotated[str, AfterValidator(collector_url)] | None = Field(
        None, description="traces go to this collector, by OTLP over HTTP: http://collector:4318; off without"
    )
    otlp_headers_file: Path | None = Field(
        None, description="file of the headers that the collector asks for, a `name: value` on each line (mode 0600)"
    )
    trace_ratio: float = Field(0.1, ge=0, le=1, description="share of requests that are traced")
    trace_service: str = Field(
        "steelyard",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$",
        description="`service.name` of the traces, with -gateway or -engine behind it",
    )

    def resolved(self) -> Settings:
        """The same settings with absolute paths, so that processes with another working directory agree."""
        update: dict[str, object] = {
            "state_dir": self.state_dir.expanduser().resolve(),
            "cache_dir": self.cache_dir.expanduser().resolve(),
        }
        if self.nvml_script is not None and self.nvml_script.endswith((".yaml", ".yml")):
            update["nvml_script"] = str(Path(self.nvml_script).expanduser().resolve())
        if self.otlp_headers_file is not None:
            update["otlp_headers_file"] = self.otlp_headers_file.expanduser().resolve()
        return self.model_copy(update=update)

    @property
    def keys_file(self) -> Path:
        """The keys that this node's gateways read. On a worker it is a copy: keys are made and revoked on the head."""
        if self.node_role == "worker":  # whatever else is set: the copy is written over
            return self.state_dir / "keys-of-head.json"
        return self.api_keys_file or self.state_dir / "keys.json"

    @property
    def api_key_file(self) -> Path:
        return self.state_dir / "api-key"

    @property
    def pid_file(self) -> Path:
        return self.state_dir / "steelyard.pid"

    @property
    def log_dir(self) -> Path:
        return self.state_dir / "logs"

    @property
    def secret_file(self) -> Path:
        return self.cluster_secret_file or self.state_dir / "cluster-secret"

    def secret(self) -> str:
        """The cluster secret, from the environment or its file (mode 0600, else refused)."""
        if self.cluster_secret is not None:
            return self.cluster_secret.get_secret_value()
        return read_private(self.secret_file, "the cluster secret", "run `steelyard up`")

    def redis_namespace(self) -> str:
        """Under which name the control store lies in an external Redis: the same for a head that moved to another machine,
        another for every other cluster."""
        if self.cluster_name is not None:
            return self.cluster_name
        return hashlib.sha256(b"steelyard control store " + self.secret().encode()).hexdigest()[:16]

    def redis_password(self) -> str:
        """The password of the external Redis; empty without a file."""
        if self.redis_password_file is None:
            return ""
        return read_private(self.redis_password_file, "the Redis password", "correct STEELYARD_REDIS_PASSWORD_FILE")

    def otlp_headers(self) -> dict[str, str]:
        """What the collector of the traces asks for; empty without a file."""
        if self.otlp_headers_file is None:
            return {}
        fix = "correct STEELYARD_OTLP_HEADERS_FILE"
        lines = read_private(self.otlp_headers_file, "the collector's headers", fix).splitlines()
        found = [_HEADER.fullmatch(line) for line in lines if line.strip()]
        if None in found:  # which one is no secret, what is in it may be
            raise OperatorError(
                f"{self.otlp_headers_file}: line {found.index(None) + 1} is no header",
                "write `name: value` on each line",
            )
        return {line[1].lower(): line[2] for line in found if line is not None}


def read_private(path: Path, what: str, fix: str) -> str:
    """A secret's file; refused when it is missing, empty or open to others."""
    try:
        found = path.stat()
        text = path.read_text().strip()
    except OSError as e:
        raise OperatorError(f"cannot read {what} {path}: {e.strerror}", fix) from None
    if readable_by_others(found):
        raise OperatorError(f"{path} can be read by others", f"run `chmod 600 {path}`")
    if not text:
        raise OperatorError(f"{path} is empty", f"remove it and {fix}")
    return text


def readable_by_others(found: os.stat_result) -> bool:
    """Whether a file of secrets is open to more than its owner. A read-only file of root's that is ours by its group alone is
    not: so Kubernetes and systemd hand a secret to a process that is not root."""
    if found.st_uid == 0 != os.geteuid():
        return bool(stat.S_IMODE(found.st_mode) & 0o037)
    return bool(stat.S_IMODE(found.st_mode) & 0o077)


def load_settings(**overrides: object) -> Settings:
    """Settings from the environment; `overrides` (from command-line options, None is ignored) win."""
    given = {k: v for k, v in overrides.items() if v is not None}
    try:
        return Settings(**given).resolved()  # type: ignore[arg-type]
    except ValidationError as e:
        first = e.errors()[0]
        name = "STEELYARD_" + "_".join(str(p) for p in first["loc"]).upper()
        given_as = re.sub(r"://.*@", "://***@", repr(first.get("input")))  # a URL's password is nobody's to read
        told = first["msg"].removeprefix("Value error, ")
        raise OperatorError(f"{name}={given_as}: {told}", "correct or unset it") from None


def worker_environment(settings: Settings) -> dict[str, str]:
    """What Ray's workers must find in their environment to load equal settings. No secret is among it."""
    env = {
        "STEELYARD_STATE_DIR": str(settings.state_dir),
        "STEELYARD_CACHE_DIR": str(settings.cache_dir),
        "STEELYARD_HOST": settings.host,
        "STEELYARD_PORT": str(settings.port),
        "STEELYARD_NODE_ROLE": settings.node_role,
    }
    if settings.cluster_secret_file is not None:
        env["STEELYARD_CLUSTER_SECRET_FILE"] = str(settings.cluster_secret_file)
    if settings.nvml_script is not None:
        env["STEELYARD_NVML_SCRIPT"] = settings.nvml_script
    if settings.api_keys_file is not None:
        env["STEELYARD_API_KEYS_FILE"] = str(settings.api_keys_file)
    if settings.otlp_endpoint is not None:
        env["STEELYARD_OTLP_ENDPOINT"] = settings.otlp_endpoint
        env["STEELYARD_TRACE_RATIO"] = str(settings.trace_ratio)
        env["STEELYARD_TRACE_SERVICE"] = settings.trace_service
    if settings.otlp_headers_file is not None:
        env["STEELYARD_OTLP_HEADERS_FILE"] = str(settings.otlp_headers_file)
    return env


def inherited_environment() -> dict[str, str]:
    """A copy of this process's environment, for building a child's."""
    return dict(os.environ)

"""WHAT may be served: the nouns of a model file, frozen and inert.

Nothing here reads a file, a clock or the environment. `store.py` builds these from YAML and turns every refusal into
one line with file and line number. A check that concerns one key of a mapping raises `impossible(key, ...)`, so that
the line of that key can be named.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from serving.catalog import clock

NAME = r"[a-z0-9][a-z0-9._-]{0,62}"
VERSION = r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"

AllowedField = Literal["priority", "cache_salt", "kv_transfer_params", "vllm_xargs", "media_urls"]
Scalar = str | int | float | bool | None
ArgValue = Scalar | list[Scalar]

MAX_REPLICAS = 256

# No underscores before a dot: vLLM takes both spellings, and a second one would slip past every check.
OPTION_NAME = r"[A-Za-z0-9][A-Za-z0-9-]*(\.[A-Za-z0-9._-]+)?"
ENV_NAME = r"(VLLM|OMP|CUDA|NCCL)_[A-Z0-9_]+"
ARGS_REFUSED = frozenset(
    [
        "model",
        "served-model-name",
        "host",
        "port",
        "uds",
        "middleware",
        "api-key",
        "lora-modules",
        "config",
        "root-path",
    ]
)
ENV_REFUSED = {
    "CUDA_VISIBLE_DEVICES": "Ray assigns the GPUs",
    "CUDA_DEVICE_ORDER": "Ray assigns the GPUs by their place on the bus",
    "VLLM_HOST_IP": "the replica sets it",
    "VLLM_API_KEY": "the engine's door has its own secret",
    "VLLM_SERVER_DEV_MODE": "it opens unguarded development routes",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "it lets messages between processes run code",
}


def impossible(key: str, why: str) -> PydanticCustomError:
    """A refusal that concerns `key` of the mapping under validation ('' for the mapping itself)."""
    return PydanticCustomError("impossible", "{why}", {"why": why, "at": key})


def _named(pattern: str, what: str) -> AfterValidator:
    compiled = re.compile(pattern)

    def check(value: str) -> str:
        if not compiled.fullmatch(value):
            raise PydanticCustomError("impossible", "{why}", {"why": f"{what} is {pattern}", "at": ""})
        return value

    return AfterValidator(check)


def _arg_value(value: Any) -> Any:
    """One verdict instead of pydantic's one error per member of the union."""
    scalars = value if isinstance(value, list) else [value]
    if all(item is None or isinstance(item, (str, int, float)) for item in scalars):
        return value
    raise impossible("", "an engine argument is a string, number, true, false, null or a list of these")


Name = Annotated[str, _named(NAME, "a name")]
VersionName = Annotated[str, _named(VERSION, "a version")]
# YAML gives lists; strict mode would accept only tuples.
Listed = Field(strict=False)


class Spec(BaseModel):
    """Base of every noun: unknown keys refused, no type coercion, no mutation."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Weights(Spec):
    """Where the weights lie, and the name of a sha256sum manifest inside that folder, if there is one."""

    source: str = Field(min_length=1)
    sha256: str | None = Field(default=None, min_length=1)


class Engine(Spec):
    """Which server generates; `args` are its own long option names without the dashes, passed through."""

    kind: Literal["vllm", "simulator"] = "vllm"
    args: dict[str, Annotated[ArgValue, BeforeValidator(_arg_value)]] = {}
    env: dict[str, str] = {}

    @field_validator("args")
    @classmethod
    def _option_names(cls, args: dict[str, ArgValue]) -> dict[str, ArgValue]:
        for name in args:
            if name in ARGS_REFUSED:
                raise impossible(name, "not settable here: it is set from the model file and the placement")
            if not re.fullmatch(OPTION_NAME, name):
                raise impossible(name, "write the option's long name with dashes, none leading, e.g. max-model-len")
        return args

    @field_validator("env")
    @classmethod
    def _env_names(cls, env: dict[str, str]) -> dict[str, str]:
        for name in env:
            if name in ENV_REFUSED:
                raise impossible(name, f"not settable here: {ENV_REFUSED[name]}")
            if not re.fullmatch(ENV_NAME, name):
                raise impossible(name, "only VLLM_*, OMP_*, CUDA_* and NCCL_* variables reach an engine")
        return env


class Resources(Spec):
    """What one replica takes from the node. `gpus` is a share below 1 or a whole number; `accelerator` is Ray's type."""

    gpus: float = Field(default=0, ge=0, le=64)
    cpus: float = Field(default=1, ge=0, le=512)
    accelerator: str | None = Field(default=None, min_length=1)

    @field_validator("gpus")
    @classmethod
    def _whole_or_share(cls, gpus: float) -> float:
        if gpus > 1 and gpus != int(gpus):
            raise impossible("", "above 1, gpus is a whole number")
        return gpus


class Adapter(Spec):
    """A LoRA adapter of one version; clients ask for it by its name as if it were a model."""

    name: Name
    source: str = Field(min_length=1)


class ScheduledMin(Spec):
    """At least `min` replicas between two cron times (five fields, local to `timezone`)."""

    start: str
    end: str
    timezone: str = "UTC"
    min: int = Field(ge=1, le=MAX_REPLICAS)

    @field_validator("start", "end")
    @classmethod
    def _cron(cls, value: str) -> str:
        try:
            return clock.check_cron(value)
        except ValueError as e:
            raise impossible("", str(e)) from None

    @field_validator("timezone")
    @classmethod
    def _zone(cls, value: str) -> str:
        try:
            return clock.zone(value).key
        except ValueError as e:
            raise impossible("", str(e)) from None


class Scaling(Spec):
    """Replica bounds and pace. `target_ongoing` is requests per replica; times are seconds."""

    min: int = Field(default=1, ge=0, le=MAX_REPLICAS)
    max: int = Field(default=1, ge=1, le=MAX_REPLICAS)
    target_ongoing: int | None = Field(default=None, ge=1, le=4096)
    scale_down_after_s: float = Field(default=300, ge=0, le=86400)
    idle_to_zero_s: float | None = Field(default=None, gt=0, le=604800)
    schedule: Annotated[tuple[ScheduledMin, ...], Listed] = ()

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.max < self.min:
            raise impossible("max", f"max is at least min ({self.min})")
        if self.idle_to_zero_s is not None and self.min > 0:
            raise impossible("idle_to_zero_s", f"needs min: 0 (min is {self.min})")
        for index, entry in enumerate(self.schedule):
            if entry.min > self.max:
                raise impossible(f"schedule.{index}.min", f"at most max ({self.max})")
        return self


class Version(Spec):
    """Weights plus engine arguments: immutable once served. One Serve application each."""

    version: VersionName
    weights: Weights | None = None
    engine: Engine = Engine()
    resources: Resources = Resources()
    adapters: Annotated[tuple[Adapter, ...], Listed] = ()
    scaling: Scaling = Scaling()
    drain_s: float = Field(default=30, ge=0, le=3600)
    start_timeout_s: float = Field(default=600, gt=0, le=7200)
    stuck_timeout_s: float = Field(default=30, ge=5, le=3600)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.weights is None and self.engine.kind == "vllm":
            raise impossible("weights", "the key is required and missing (only the simulator runs without)")
        names = [adapter.name for adapter in self.adapters]
        for name in names:
            if names.count(name) > 1:
                raise impossible("adapters", f"adapter {name!r} is listed twice")
        size = self.world_size
        if "gpus" in self.resources.model_fields_set and 0 < self.resources.gpus < size and size > 1:
            raise impossible("resources", f"tensor x pipeline parallel size is {size}: gpus is at least {size}")
        return self

    @property
    def world_size(self) -> int:
        """Processes that share the model: tensor times pipeline parallel size."""
        size = 1
        for option in ("tensor-parallel-size", "pipeline-parallel-size"):
            value = self.engine.args.get(option, 1)
            size *= value if isinstance(value, int) and value > 0 else 1
        return size


class Release(Spec):
    """Which version answers a request that names only the model."""

    stable: VersionName


class Limits(Spec):
    """Bounds of one model's requests, over all its versions. `max_queue` (of each gateway) 0 means: never wait. None: none. A
    held stream gets its 200 and keep-alives from `keep_alive_after_s` seconds on; None: never before its first token."""

    max_queue: int = Field(default=512, ge=0, le=100_000)
    max_wait_s: float = Field(default=60, ge=0, le=3600)
    max_input_tokens: int | None = Field(default=None, ge=1)
    request_timeout_s: float = Field(default=600, gt=0, le=86400)
    keep_alive_after_s: float | None = Field(default=15, ge=0, le=3600)
    max_body_bytes: int = Field(default=16 * 1024 * 1024, ge=1024, le=1024**3)
    max_concurrent: int | None = Field(default=None, ge=1, le=1_000_000)
    tokens_per_minute: int | None = Field(default=None, ge=1, le=10**12)


class Slo(Spec):
    """What the model's users are promised: this share of requests gets a right answer, and streams begin within `ttft_s`.
    Alerts burn against it (docs/observability.md)."""

    ttft_s: float = Field(default=2.5, gt=0, le=600)
    objective: float = Field(default=0.99, ge=0.5, lt=1)


class Placement(Spec):
    """Node labels that replicas of the model require."""

    labels: dict[str, str] = {}


class ModelSpec(Spec):
    """One model file."""

    name: Name
    versions: Annotated[tuple[Version, ...], Listed]
    release: Release
    limits: Limits = Limits()
    slo: Slo = Slo()
    allow: Annotated[tuple[AllowedField, ...], Listed] = ()
    placement: Placement = Placement()

    @model_validator(mode="before")
    @classmethod
    def _only_version_is_stable(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("release") is not None:
            return data
        versions = data.get("versions")
        if isinstance(versions, list | tuple) and len(versions) == 1:
            only = versions[0]
            name = only.get("version") if isinstance(only, dict) else getattr(only, "version", None)
            # An ill-typed version has its own error; it must not be reported a second time for a key nobody wrote.
            if not (isinstance(name, str) and re.fullmatch(VERSION, name)):
                name = "unknown"
            return {**data, "release": {"stable": name}}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [version.version for version in self.versions]
        # Not a length bound of the field: pydantic would report it beside every error inside the list.
        if not names:
            raise impossible("versions", "at least one version is needed")
        for index, name in enumerate(names):
            if name in names[:index]:
                raise impossible(f"versions.{index}.version", "a version is listed once")
        if self.release.stable not in names:
            raise impossible("release.stable", f"names one of the versions: {', '.join(names)}")
        return self

    def version(self, name: str) -> Version:
        """The version of that name; KeyError when there is none."""
        for version in self.versions:
            if version.version == name:
                return version
        raise KeyError(name)


def version_id(model: str, version: str) -> str:
    """`model@version`: the name of the Serve application, and what a client writes to address one version."""
    return f"{model}@{version}"


class Served(NamedTuple):
    """What a client's `model` string stands for."""

    model: str
    version: str
    adapter: str | None


class NameClash(ValueError):
    """Two things in the catalog have one name. `model` is the index of the later one, `path` the key in its file."""

    def __init__(self, model: int, path: tuple[str | int, ...], name: str, owner: int) -> None:
        super().__init__(f"{name!r} is taken")
        self.model, self.path, self.name, self.owner = model, path, name, owner


def _claims(spec: ModelSpec) -> Iterator[tuple[tuple[str | int, ...], str]]:
    yield ("name",), spec.name
    for i, version in enumerate(spec.versions):
        for j, adapter in enumerate(version.adapters):
            yield ("versions", i, "adapters", j, "name"), adapter.name


def _served(spec: ModelSpec) -> Iterator[tuple[str, Served]]:
    """Later pairs win. An adapter without a version means the stable one if it has it, else the last listed."""
    stable = spec.version(spec.release.stable)
    for version in (*spec.versions, stable):
        for name, adapter in ((spec.name, None), *((a.name, a.name) for a in version.adapters)):
            served = Served(spec.name, version.version, adapter)
            yield version_id(name, version.version), served
            yield name, served


@dataclass(frozen=True)
class Catalog:
    """Every model that may be served, and what each name a client can write means.

    `folders` holds the folder of each model's file: relative weight sources start there. Names of models and adapters
    are unique over all models (NameClash); several versions of one model may carry the same adapter.
    """

    models: tuple[ModelSpec, ...]
    folders: Mapping[str, Path] = field(default_factory=dict)
    served_names: Mapping[str, Served] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        owner: dict[str, int] = {}
        served: dict[str, Served] = {}
        for index, spec in enumerate(self.models):
            for path, name in _claims(spec):
                adapter_again = path[0] == "versions" and owner.get(name) == index and name != spec.name
                if name in owner and not adapter_again:
                    raise NameClash(index, path, name, owner[name])
                owner[name] = index
            served.update(_served(spec))
        object.__setattr__(self, "served_names", served)

    def resolve(self, name: str) -> Served | None:
        """What the `model` field of a request means: model, model@version, adapter, adapter@version; None if nothing."""
        return self.served_names.get(name)

    def model(self, name: str) -> ModelSpec:
        """The model of that name; KeyError when there is none."""
        for spec in self.models:
            if spec.name == name:
                return spec
        raise KeyError(name)

    def versions(self) -> Iterator[tuple[ModelSpec, Version]]:
        """Every (model, version), in the order of the files."""
        for spec in self.models:
            for version in spec.versions:
                yield spec, version


ALLOWED_FIELDS: tuple[str, ...] = get_args(AllowedField)

"""Replica bounds set at run time: `STATE_DIR/scaling.json` lies over the catalog, on the head, until it is reset."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from serving.catalog.spec import MAX_REPLICAS, Catalog, version_id
from serving.cli.cluster import write_private
from serving.errors import OperatorError
from serving.settings import Settings


class Bounds(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of one version. Raises ValueError when nothing could have them."""

    min: int
    max: int

    def __post_init__(self) -> None:
        if not 0 <= self.min <= MAX_REPLICAS:
            raise ValueError(f"min is {self.min}; it is 0 to {MAX_REPLICAS}")
        if not 1 <= self.max <= MAX_REPLICAS:
            raise ValueError(f"max is {self.max}; it is 1 to {MAX_REPLICAS}")
        if self.max < self.min:
            raise ValueError(f"max is {self.max} and min {self.min}; max is at least min")


def path(settings: Settings) -> Path:
    return settings.state_dir / "scaling.json"


def read(settings: Settings) -> dict[str, Bounds]:
    """Version id -> bounds; empty without a file."""
    file = path(settings)
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, Bounds])
    except FileNotFoundError:
        return {}
    except OSError as e:
        raise OperatorError(f"cannot read {file}: {e.strerror}") from None
    except (ValueError, msgspec.MsgspecError) as e:
        raise OperatorError(f"{file}: {e}", "correct it, or remove it to go back to the model files") from None


def write(settings: Settings, bounds: dict[str, Bounds]) -> None:
    """Atomically, mode 0600; no file for no bounds."""
    file = path(settings)
    try:
        if bounds:
            write_private(file, msgspec.json.format(msgspec.json.encode(bounds)).decode() + "\n")
        else:
            file.unlink(missing_ok=True)
    except OSError as e:
        raise OperatorError(f"cannot write {file}: {os.strerror(e.errno or 0)}") from None


def laid_over(catalog: Catalog, settings: Settings) -> tuple[Catalog, list[str]]:
    """The catalog with the bounds set at run time, and a line for each for whoever reads what `up` prints."""
    bounds, said = read(settings), []
    known = {version_id(m.name, v.version) for m, v in catalog.versions()}
    for gone in sorted(bounds.keys() - known):
        said.append(f"{gone}: bounds set by `steelyard scale set` wait for a version that the catalog does not have")
    if not bounds.keys() & known:
        return catalog, said
    models = []
    for model in catalog.models:
        versions = []
        for version in model.versions:
            name = version_id(model.name, version.version)
            own = version.scaling
            if name in bounds and (bounds[name].min, bounds[name].max) != (own.min, own.max):
                set_to = bounds[name]
                scaling = own.model_copy(update={"min": set_to.min, "max": set_to.max})
                version = version.model_copy(update={"scaling": scaling})
                said.append(
                    f"{name}: {set_to.min} to {set_to.max} replicas, set by `steelyard scale set`, "
                    f"not {own.min} to {own.max} as its model file says"
                )
            versions.append(version)
        models.append(model.model_copy(update={"versions": tuple(versions)}))
    return Catalog(tuple(models), catalog.folders), said

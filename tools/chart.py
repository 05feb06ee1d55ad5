"""Writes what the Helm chart shares with the code and with itself, so that each thing is said once:

    values.schema.json   from the comments of values.yaml, and from serving.catalog.spec for `models`
    README.md            the table of values, from the same comments, into README.md.tpl
    files/catalog.json   defaults and constants of the catalog and of the Serve config, for the templates
    files/observability/ rules and dashboards of deploy/observability: a chart reads no file outside itself

`python -m tools.chart` writes them; `--check` exits 1 naming the ones that are stale.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

from serving.catalog import spec, store, weights
from serving.catalog.spec import Catalog, ModelSpec
from serving.engine import command
from serving.fleet import manifest, spare

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "k8s" / "steelyard"
OBSERVABILITY = ROOT / "deploy" / "observability"
CACHE_DIR = "/var/cache/steelyard"  # of the image: what its recipes made
RECIPES_DIR = "/opt/steelyard/models"  # of the image

_GROUP_NAME = "^[a-z]([-a-z0-9]{0,30}[a-z0-9])?$"
_CRON = r"^\S+( +\S+){4}$"  # what it says is for the policy to judge
_QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$"


def main() -> int:
    made = texts()
    stale = [name for name, text in made.items() if not (CHART / name).exists() or (CHART / name).read_text() != text]
    if "--check" in sys.argv:
        for name in stale:
            print(f"{CHART / name} is stale: run `make chart-docs`")
        return bool(stale)
    for name in stale:
        (CHART / name).parent.mkdir(parents=True, exist_ok=True)
        (CHART / name).write_text(made[name])
        print(f"wrote {CHART / name}")
    return 0


def texts() -> dict[str, str]:
    """Everything that is written: path in the chart -> content."""
    return {
        "values.schema.json": schema_text(),
        "README.md": readme(),
        "files/catalog.json": _json(catalog_facts()),
        **observability(),
    }


def observability() -> dict[str, str]:
    """The rules as they are, the dashboards without their spaces."""
    rules = {name: (OBSERVABILITY / name).read_text() for name in ("recording.yml", "alerts.yml")}
    dashboards = {
        f"dashboards/{file.name}": json.dumps(json.loads(file.read_text()), separators=(",", ":")) + "\n"
        for file in sorted((OBSERVABILITY / "dashboards").glob("*.json"))
    }
    return {f"files/observability/{name}": text for name, text in (rules | dashboards).items()}


# -- files/catalog.json --------------------------------------------------------------------------------------------


def catalog_facts() -> dict[str, Any]:
    """What the templates must know of the code: read off the code by asking it about a smallest catalog."""
    model = ModelSpec.model_validate({"name": "m", "versions": [{"version": "v", "weights": {"source": "/w"}}]})
    bare = Catalog((model,), {"m": Path("/")})
    version = model.versions[0]
    config = manifest.serve_config(bare, gateways=1, nodes=1, locate=lambda source, base: Path(source))
    gateway, engine = config.pop("applications")
    gateway["deployments"][0]["user_config"] = {}
    engine["args"] = {}
    engine["deployments"][0]["autoscaling_config"] = {"policy": {"policy_function": manifest.POLICY}}
    cpu = store.apply_profile(bare, "cpu").models[0].versions[0].engine
    return {
        "rayVersion": _ray_version(),
        "preload": spare.PRELOAD,
        "cacheDir": CACHE_DIR,
        "recipesDir": RECIPES_DIR,
        "recipes": {
            script.parent.name: weights.locate(
                f"build:{script.parent.name}/x", base=ROOT / "models", cache=Path(CACHE_DIR)
            ).parent.name
            for script in sorted((ROOT / "models").glob("*/build.py"))
        },
        "version": {name: getattr(version, name) for name in ("drain_s", "start_timeout_s", "stuck_timeout_s")},
        "engine": {"kind": version.engine.kind, "args": {}, "env": {}},
        "resources": {"gpus": version.resources.gpus, "cpus": version.resources.cpus},
        "scaling": version.scaling.model_dump(),
        "slots": command.DEFAULT_SLOTS,
        "limits": model.limits.model_dump(),
        "slo": model.slo.model_dump(),
        "cpu": {"args": cpu.args, "env": cpu.env},
        "sim": {"args": list(store.SIMULATED_ARGS)},
        "stopGraceSeconds": manifest.STOP_GRACE_S,
        "config": config,
        "gatewayApp": gateway,
        "engineApp": engine,
    }


def _ray_version() -> str:
    found = re.search(r'"ray\[serve\]==([0-9.]+)"', (ROOT / "pyproject.toml").read_text())
    assert found, "pyproject.toml pins no ray[serve]"
    return found[1]


# -- values.schema.json --------------------------------------------------------------------------------------------


def schema_text() -> str:
    defs = _model_defs()
    defs["Quantity"] = {"type": "string", "pattern": _QUANTITY}
    defs["PodResources"] = {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            part: {"type": "object", "additionalProperties": {"type": ["string", "integer"]}}
            for part in ("requests", "limits")
        },
    }
    defs["WorkerGroup"] = _worker_group()
    root = _object(_values(), ())
    root["properties"]["models"] = {
        "description": root["properties"]["models"]["description"],
        "type": "array",
        "items": {"$ref": "#/$defs/ModelSpec"},
    }
    root["properties"]["global"] = {"type": "object", "description": "Set by parent charts; unused."}
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Values of the steelyard chart"}
    return _json({**head, **root, "$defs": defs})


def _worker_group() -> dict[str, Any]:
    strings = {"type": "object", "additionalProperties": {"type": "string"}}
    fields: dict[str, Any] = {
        "name": {"type": "string", "pattern": _GROUP_NAME, "description": "Name of the group."},
        "replicas": {"type": "integer", "minimum": 0, "maximum": 256, "description": "Pods of the group."},
        "accelerator": {"type": "string", "description": "A key of `accelerators`, e.g. H100."},
        "gpus": {"type": "integer", "minimum": 0, "maximum": 16, "description": "GPUs of each pod."},
        "resources": {"$ref": "#/$defs/PodResources", "description": "Instead of workerDefaults.resources."},
        "labels": {**strings, "description": "Ray node labels, for `placement.labels` of models."},
        "nodeSelector": {**strings, "description": "Added to the accelerator's."},
        "tolerations": {"type": "array", "items": {"type": "object"}, "description": "Added to the accelerator's."},
        "affinity": {"type": "object", "description": "Affinity of the pods."},
        "shmSize": {"$ref": "#/$defs/Quantity", "description": "Instead of workerDefaults.shmSize."},
        "priorityClassName": {"type": "string", "description": "Instead of workerDefaults.priorityClassName."},
    }
    return {"type": "object", "additionalProperties": False, "required": ["name", "replicas"], "properties": fields}


def _model_defs() -> dict[str, Any]:
    """ModelSpec as JSON Schema. The rules that pydantic keeps in validators are added here: names, and the engine
    arguments and variables that a model file may not set."""
    schema = ModelSpec.model_json_schema()
    defs: dict[str, Any] = schema.pop("$defs")
    defs["ModelSpec"] = schema
    name, version = {"type": "string", "pattern": f"^{spec.NAME}$"}, {"type": "string", "pattern": f"^{spec.VERSION}$"}
    defs["ModelSpec"]["properties"]["name"] = name
    defs["ModelSpec"]["properties"]["versions"]["minItems"] = 1
    defs["ModelSpec"]["required"] = ["name", "versions"]  # release: the only version is the stable one
    defs["Adapter"]["properties"]["name"] = name
    defs["Version"]["properties"]["version"] = version
    defs["Release"]["properties"]["stable"] = version
    for when in ("start", "end"):
        defs["ScheduledMin"]["properties"][when] = {"type": "string", "pattern": _CRON}
    engine = defs["Engine"]["properties"]
    engine["args"]["propertyNames"] = {
        "pattern": f"^{spec.OPTION_NAME}$",
        "not": {"enum": sorted(spec.ARGS_REFUSED)},
    }
    engine["env"]["propertyNames"] = {"pattern": f"^{spec.ENV_NAME}$", "not": {"enum": sorted(spec.ENV_REFUSED)}}
    for part in defs.values():
        _plain(part)
    return defs


def _plain(node: Any) -> None:
    """Without pydantic's titles: they repeat the key."""
    if isinstance(node, dict):
        if isinstance(node.get("title"), str):
            del node["title"]
        for child in node.values():
            _plain(child)
    elif isinstance(node, list):
        for child in node:
            _plain(child)


def _object(values: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """Schema of one mapping of values.yaml; a key's own `@schema` block wins over what its default tells."""
    told = _comments()
    properties: dict[str, Any] = {}
    for key, default in values.items():
        here = (*path, key)
        text, fragment = told.get(here, ("", {}))
        if isinstance(default, dict) and default and "$ref" not in fragment and "additionalProperties" not in fragment:
            part = _object(default, here)
        else:
            part = {} if "$ref" in fragment else {"type": _type(default)}
            if isinstance(default, dict) and "$ref" not in fragment and "additionalProperties" not in fragment:
                raise SystemExit(f"values.yaml: {'.'.join(here)}: an empty mapping needs an @schema block")
        part |= fragment
        if not text and part.get("type") != "object":
            raise SystemExit(f"values.yaml: {'.'.join(here)}: no `# --` comment")
        properties[key] = {"description": text, **part} if text else part
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _type(default: Any) -> str:
    for kind, name in ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (list, "array")):
        if isinstance(default, kind):
            return name
    return "object"


# -- README.md -----------------------------------------------------------------------------------------------------


def readme() -> str:
    rows = ["| value | default | meaning |", "|---|---|---|"]
    for path, (text, _) in _comments().items():
        default: Any = _values()
        for key in path:
            default = default[key]
        shown = json.dumps(default, separators=(", ", ": "))
        shown = shown if len(shown) <= 60 else "see values.yaml"
        rows.append(f"| `{'.'.join(path)}` | `{shown}` | {text.replace('|', chr(92) + '|')} |")
    group = ["| key | meaning |", "|---|---|"]
    group += [f"| `{key}` | {part['description']} |" for key, part in _worker_group()["properties"].items()]
    text = (CHART / "README.md.tpl").read_text()
    return text.replace("@VALUES@", "\n".join(rows)).replace("@WORKERS@", "\n".join(group))


# -- values.yaml and its comments ----------------------------------------------------------------------------------


def _values() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
    return loaded


def _comments() -> dict[tuple[str, ...], tuple[str, dict[str, Any]]]:
    """Key path -> (description, schema fragment), for every key with a `# --` comment above it, in order."""
    text = (CHART / "values.yaml").read_text()
    lines = text.splitlines()
    found: dict[tuple[str, ...], tuple[str, dict[str, Any]]] = {}

    def walk(node: yaml.Node, path: tuple[str, ...]) -> None:
        if not isinstance(node, yaml.MappingNode) or node.flow_style:
            return
        for key, value in node.value:
            here = (*path, str(key.value))
            told = _above(lines, key.start_mark.line)
            if told[0]:
                found[here] = told
            walk(value, here)

    root = yaml.compose(text)
    assert root is not None
    walk(root, ())
    return found


def _above(lines: list[str], line: int) -> tuple[str, dict[str, Any]]:
    start = line
    while start and lines[start - 1].strip().startswith("#"):
        start -= 1
    block = [entry.strip().removeprefix("#").removeprefix(" ") for entry in lines[start:line]]
    if not block or not block[0].startswith("-- "):
        return "", {}
    words: list[str] = []
    fragment: list[str] = []
    inside = False
    for entry in block:
        if entry.strip() == "@schema":
            inside = not inside
        elif inside:
            fragment.append(entry)
        else:
            words.append(entry.removeprefix("-- ").strip())
    return " ".join(words), yaml.safe_load("\n".join(fragment)) or {}


def _json(data: Any) -> str:
    return json.dumps(data, indent=2) + "\n"


if __name__ == "__main__":
    sys.exit(main())

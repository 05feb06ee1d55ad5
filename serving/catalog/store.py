"""Reads model files. Every refusal is one line: file, line, key path, value, and what is allowed.

Pydantic says where in the data an error lies, not where in the file: the composed YAML tree, whose nodes carry marks,
is descended along the same path.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ValidationError

from serving.catalog.spec import Catalog, Engine, ModelSpec, NameClash, Resources, Version
from serving.errors import CatalogError

Profile = Literal["cpu", "gpu", "sim"]
Key = tuple[str | int, ...]

SIMULATED_ARGS = ("max-num-seqs", "max-model-len")
_ABSENT = object()
MAX_FILE_BYTES = 1024 * 1024


def load(path: Path | str, profile: Profile, *, simulated_gpus: bool = False) -> Catalog:
    """The catalog of a folder of *.yaml, of one file, or of a comma-separated list of these.

    Raises CatalogError for the first bad file: its first error, and how many others it has.
    """
    found = files(path)
    documents = [_Document(file) for file in found]
    specs = tuple(document.spec for document in documents)
    folders = {spec.name: file.resolve().parent for spec, file in zip(specs, found, strict=True)}
    try:
        catalog = Catalog(specs, folders)
    except NameClash as clash:
        where = documents[clash.model]
        owner = documents[clash.owner].file
        raise where.error(clash.path, f"the name is taken by {owner}: model and adapter names are unique") from None
    return apply_profile(catalog, profile, simulated_gpus=simulated_gpus)


def files(path: Path | str) -> list[Path]:
    """The model files that `load` would read, in its order."""
    parts = [part.strip() for part in str(path).split(",")]
    if not all(parts):
        raise CatalogError(f"{str(path)!r} names no catalog", "Name a model file, a folder of *.yaml, or a comma list")
    return [file for part in parts for file in _files(Path(part))]


def document(file: Path) -> Any:
    """The data of one model file as it is written, after the same checks."""
    return _Document(file).data


def apply_profile(catalog: Catalog, profile: Profile, *, simulated_gpus: bool = False) -> Catalog:
    """The same catalog for a machine without GPUs (cpu), with GPUs (gpu), or with simulated engines (sim), which hold the
    GPUs that the real ones would where these are simulated too."""
    change = {"cpu": _on_cpu, "gpu": _on_gpu, "sim": _on_simulated_gpu if simulated_gpus else _simulated}[profile]
    models = tuple(
        spec.model_copy(update={"versions": tuple(change(version) for version in spec.versions)})
        for spec in catalog.models
    )
    return Catalog(models, catalog.folders)


def _on_cpu(version: Version) -> Version:
    engine = version.engine
    if engine.kind == "vllm":
        engine = engine.model_copy(
            update={
                "args": {"enforce-eager": True, **engine.args},
                "env": {
                    "VLLM_CPU_KVCACHE_SPACE": "1",
                    **_threads(version.resources.cpus / version.world_size),
                    **engine.env,
                },
            }
        )
    return version.model_copy(update={"engine": engine, "resources": _no_gpu(version)})


def _threads(cpus: float) -> dict[str, str]:
    """As many as each worker of a replica takes from its node. Left to itself vLLM binds its threads to the node's first cores,
    and those of every other replica there to the same ones."""
    return {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(max(1, int(cpus)))}


def _on_gpu(version: Version) -> Version:
    if version.engine.kind != "vllm" or "gpus" in version.resources.model_fields_set:
        return version
    resources = version.resources.model_copy(update={"gpus": float(version.world_size)})
    return version.model_copy(update={"resources": resources})


def _simulated(version: Version) -> Version:
    engine = version.engine
    if engine.kind == "vllm":
        # Of vLLM's options, the simulator knows those that bound a request; its own are in a simulator's file.
        engine = Engine(kind="simulator", args={k: v for k, v in engine.args.items() if k in SIMULATED_ARGS})
    return version.model_copy(update={"engine": engine, "weights": None, "resources": _no_gpu(version)})


def _on_simulated_gpu(version: Version) -> Version:
    gpus = _on_gpu(version).resources.gpus
    version = _simulated(version)
    return version.model_copy(update={"resources": version.resources.model_copy(update={"gpus": gpus})})


def _no_gpu(version: Version) -> Resources:
    return version.resources.model_copy(update={"gpus": 0.0, "accelerator": None})


def _files(path: Path) -> Sequence[Path]:
    if path.is_dir():
        files = sorted(path.glob("*.yaml"))
        if not files:
            raise CatalogError(f"{path}: no *.yaml in this folder", "Put one model file per model there")
        return files
    if not path.is_file():
        raise CatalogError(f"{path}: no such file or folder", "Name a model file or a folder of *.yaml")
    return [path]


class _Loader(yaml.SafeLoader):
    """YAML's safe subset, minus dates (a version like 2026-11-01 is a string), with a mark on every failure."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError, RecursionError) as cause:
            raise yaml.constructor.ConstructorError(None, None, f"not readable: {cause}", node.start_mark) from None


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Document:
    """One file: its node tree for line numbers, its data, and the spec made of it."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.root, self.data = self._parse(self._read())
        self.spec = self._validate()

    def error(self, path: Key, allowed: str, *, others: int = 0) -> CatalogError:
        """One line for the value at `path`. A missing key has no line of its own: its mapping's is named."""
        key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
        value = self._value(path)
        shown = "" if value is _ABSENT else f" = {_show(value)}"
        more = f" (and {others} more in this file)" if others else ""
        return CatalogError(f"{self.file}:{self.line(path)}: {key or 'the file'}{shown}: {allowed}{more}")

    def line(self, path: Key) -> int:
        """Line (from 1) of the deepest part of `path` that the file has."""
        node, line = self.root, self.root.start_mark.line
        for part in path:
            if isinstance(node, yaml.MappingNode):
                # After construction merged pairs come first, so the last match is the one that counts.
                pairs = [pair for pair in node.value if pair[0].value == str(part)]
                if not pairs:
                    break
                line, node = pairs[-1][0].start_mark.line, pairs[-1][1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                node = node.value[part]
                line = node.start_mark.line
            else:
                break
        return int(line) + 1

    def _value(self, path: Key) -> Any:
        value = self.data
        for part in path:
            try:
                value = value[part]
            except (KeyError, IndexError, TypeError):
                return _ABSENT
        return value

    def _read(self) -> str:
        try:
            raw = self.file.read_bytes()
        except OSError as cause:
            raise CatalogError(f"{self.file}: cannot be read: {cause.strerror}") from None
        if len(raw) > MAX_FILE_BYTES:
            raise CatalogError(f"{self.file}: {len(raw)} bytes is no model file; at most {MAX_FILE_BYTES}")
        try:
            return raw.decode("utf-8-sig")
        except UnicodeDecodeError as cause:
            line = raw.count(b"\n", 0, cause.start) + 1
            raise CatalogError(f"{self.file}:{line}: not UTF-8 text") from None

    def _parse(self, text: str) -> tuple[yaml.Node, Any]:
        try:
            loader = _Loader(text)
            try:
                root = loader.get_single_node()
                if root is None:
                    raise CatalogError(f"{self.file}:1: the file is empty", "A model file starts with name:")
                self._refuse_duplicates(root)
                return root, loader.construct_document(root)
            finally:
                loader.dispose()
        except yaml.reader.ReaderError as cause:
            line = text.count("\n", 0, cause.position) + 1
            raise CatalogError(f"{self.file}:{line}: not YAML: {cause.reason}") from None
        except yaml.MarkedYAMLError as cause:
            mark = cause.problem_mark or cause.context_mark
            said = " ".join(str(part) for part in (cause.context, cause.problem) if part)
            raise CatalogError(f"{self.file}:{mark.line + 1 if mark else 1}: not YAML: {_flat(said)}") from None
        except RecursionError:
            raise CatalogError(f"{self.file}:1: not a model file: nested too deeply") from None

    def _refuse_duplicates(self, root: yaml.Node) -> None:
        """Plain YAML lets the last of two equal keys win silently. Aliased nodes are visited once."""
        seen: set[int] = set()
        todo = [root]
        while todo:
            node = todo.pop()
            if id(node) in seen:
                continue
            seen.add(id(node))
            if isinstance(node, yaml.SequenceNode):
                todo.extend(reversed(node.value))
            elif isinstance(node, yaml.MappingNode):
                first: dict[str, int] = {}
                for key, _ in node.value:
                    if not isinstance(key, yaml.ScalarNode):
                        continue
                    line = key.start_mark.line + 1
                    if key.value in first:
                        raise CatalogError(
                            f"{self.file}:{line}: {_show(key.value)}: the key is there twice (first on line "
                            f"{first[key.value]})"
                        )
                    first[key.value] = line
                todo.extend(value for _, value in reversed(node.value))

    def _validate(self) -> ModelSpec:
        try:
            return ModelSpec.model_validate(self.data)
        except ValidationError as refused:
            found = [_explain(dict(error)) for error in refused.errors(include_url=False)]
            # Missing keys last: a misspelt one is reported as unknown and as missing, and the first says which it is.
            found.sort(key=lambda entry: (self._value(entry[0]) is _ABSENT, self.line(entry[0])))
            path, allowed = found[0]
            raise self.error(path, allowed, others=len(found) - 1) from None


def _explain(error: dict[str, Any]) -> tuple[Key, str]:
    """One pydantic error as (path in the file, what is allowed)."""
    path: Key = tuple(part for part in error["loc"] if part != "[key]")
    context, kind, message = error.get("ctx", {}), error["type"], str(error["msg"])
    if kind == "impossible":
        at = str(context["at"])
        # Version and option names may hold dots, so only our own paths are taken apart.
        inner = at.split(".") if at.startswith(("versions.", "release.", "schedule.")) else [at]
        deeper = tuple(int(part) if part.isdigit() else part for part in inner if part)
        return (*path, *deeper), str(context["why"])
    if kind == "extra_forbidden":
        known = list(_model_at(path[:-1]).model_fields)
        close = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}? " if close else ""
        return path, f"unknown key; {hint}allowed: {', '.join(known)}"
    if kind == "missing":
        return path, "the key is required and missing"
    if kind == "string_type" and isinstance(error["input"], (int, float)):
        return path, "a string is wanted: put it in quotes"
    if kind == "literal_error":
        return path, f"allowed: {context['expected']}"
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        return path, "a mapping (key: value) is wanted"
    if kind in ("tuple_type", "list_type"):
        return path, "a list is wanted"
    return path, _flat(message[:1].lower() + message[1:])


def _model_at(path: Key) -> type[BaseModel]:
    model: type[BaseModel] = ModelSpec
    for part in path:
        if isinstance(part, str):
            annotation = model.model_fields[part].annotation
            model = next(
                kind
                for kind in (annotation, *get_args(annotation))
                if isinstance(kind, type) and issubclass(kind, BaseModel)
            )
    return model


def _show(value: Any) -> str:
    short = reprlib.Repr()
    short.maxstring = short.maxother = 60
    short.maxdict = short.maxlist = 3
    return _flat(short.repr(value))


def _flat(text: str) -> str:
    return " ".join(text.split())

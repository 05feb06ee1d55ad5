"""The names one server answers to."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

from serving.engine.simulator import wire


@dataclass(frozen=True)
class Models:
    """What this server answers to: its names, its adapters, and the weights all of them share."""

    served: tuple[str, ...]
    root: str
    adapters: dict[str, str]
    max_model_len: int
    seed: int
    started: int

    def resolve(self, name: str | None) -> str:
        """The name the answer will carry: the adapter's, else the first served name whichever alias was used."""
        if not name or name in self.served:
            return self.served[0]
        if name in self.adapters:
            return name
        aliases = ", ".join(self.served)
        message = f"The model `{name}` does not exist. Valid aliases: {aliases}."
        raise wire.Refusal(404, message, "NotFoundError", "model")

    def identity(self, name: str) -> str:
        """Whose answer it is: versions served under one alias must not answer alike."""
        return f"{self.seed} {' '.join(self.served)} {name}"

    def cards(self) -> dict[str, Any]:
        """The body of /v1/models."""
        base = [self._card(name, self.root, None, self.max_model_len) for name in self.served]
        return {
            "object": "list",
            "data": base + [self._card(name, path, self.served[0], None) for name, path in self.adapters.items()],
        }

    def _card(self, name: str, root: str, parent: str | None, max_model_len: int | None) -> dict[str, Any]:
        permission = {
            "id": f"modelperm-{uuid.uuid4().hex[:16]}",
            "object": "model_permission",
            "created": self.started,
            "allow_create_engine": False,
            "allow_sampling": True,
            "allow_logprobs": True,
            "allow_search_indices": False,
            "allow_view": True,
            "allow_fine_tuning": False,
            "organization": "*",
            "group": None,
            "is_blocking": False,
        }
        return {
            "id": name,
            "object": "model",
            "created": self.started,
            "owned_by": "vllm",
            "root": root,
            "parent": parent,
            "max_model_len": max_model_len,
            "permission": [permission],
        }

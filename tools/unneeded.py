"""Prints the installed packages that running Steelyard does not need: what the lock file holds for tests and checks.

`python tools/unneeded.py cpu|gpu | xargs pip uninstall -y` is the last step of an image. Standard library, and the
`packaging` that is always there.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution, distributions

from packaging.requirements import Requirement

ROOT = "steelyard"


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def needed(name: str, extras: Iterable[str]) -> set[str]:
    """Normalised names of `name[extras]` and all it requires here, as the installed packages say themselves."""
    seen: set[tuple[str, frozenset[str]]] = set()
    todo = [(name, frozenset(extras))]
    while todo:
        one = todo.pop()
        if one in seen:
            continue
        seen.add(one)
        try:
            requires = distribution(one[0]).requires or []
        except PackageNotFoundError:
            continue  # an optional one, or left out on purpose
        for text in requires:
            r = Requirement(text)
            if r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in (*one[1], "")):
                todo.append((normal(r.name), frozenset(r.extras)))
    return {found for found, _ in seen}


def unneeded(extra: str) -> list[str]:
    keep = needed(ROOT, [extra]) | {"pip"}  # pip removes the others
    return sorted({normal(d.name) for d in distributions()} - keep)


if __name__ == "__main__":
    print("\n".join(unneeded(sys.argv[1])))

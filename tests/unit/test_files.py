"""A small file is the old one or the new one, and nobody else's to read."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from serving import files


def test_the_new_one_replaces_the_old_one_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    for content in (b"old", b"new"):
        files.replace(path, content)
        assert path.read_bytes() == content
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["secret"]


def test_where_it_cannot_be_written_the_old_one_stays_and_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    files.replace(path, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))  # as on a full disk; Python ignores its signal
    try:
        with pytest.raises(OSError):
            files.replace(path, b"new" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["secret"]

"""What every command tells a terminal: whole tables, and one line of what went wrong."""

from __future__ import annotations

import errno
import io
import os
import sys
from pathlib import Path

import pytest
import typer
from rich.table import Table

from serving.cli.term import one_line_errors, show


@pytest.mark.parametrize("columns", ["40", "80"])
def test_nothing_is_cut_from_a_table(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(sys, "stdout", out)
    table = Table("replica", "url", box=None, pad_edge=False)
    ids = ["support-llama@2026-11-01#k7yfpype", "http://node-17.rack-4.example.org:47435"]
    table.add_row(*ids)
    show(table)
    assert out.getvalue().splitlines()[1].split() == ids


def refused(does: object) -> None:
    with one_line_errors():
        assert callable(does)
        does()


def test_what_a_file_system_refuses_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for does, said in (
        (lambda: (tmp_path / "file" / "x").write_text(""), f"error: {tmp_path}/file/x: Not a directory. correct"),
        (lambda: Path("/dev/full").write_text("x"), "error: No space left on device. free some space"),
        (lambda: os.mkdir("/proc/steelyard"), "error: /proc/steelyard: No such file or directory. correct"),
    ):
        with pytest.raises(typer.Exit) as ended:
            refused(does)
        told = capsys.readouterr().err
        assert ended.value.exit_code == 1 and told.startswith(said) and told.count("\n") == 1


def test_what_nobody_can_mend_there_keeps_its_trace() -> None:
    def broken() -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        refused(broken)

"""How commands speak to a terminal."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

import typer
from rich.console import Console
from rich.table import Table

from serving.errors import OperatorError

# What a file system refuses, and what a person can do about it.
_FIXES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space there, or name another folder"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "let this user write there, or name another folder"),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG), "correct the path"),
    **dict.fromkeys((errno.EIO, errno.ESTALE), "look after the disk"),
}


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """What an operator can mend is one sentence on stderr and exit code 1, without a stack trace."""
    try:
        yield
    except OperatorError as e:
        _end(str(e))
    except OSError as e:
        if e.errno not in _FIXES:
            raise
        _end(f"{f'{e.filename}: ' if e.filename else ''}{e.strerror}. {_FIXES[e.errno]}")


def _end(said: str) -> None:
    typer.echo(f"error: {said}", err=True)
    raise typer.Exit(1) from None


def show(table: Table) -> None:
    """Prints all of it: who wants to copy an id needs all of that, and a terminal wraps what is too wide for it."""
    console = Console(highlight=False)
    wide = console.options.update(max_width=10_000)
    console.width = max(console.width, console.measure(table, options=wide).maximum)
    console.print(table)

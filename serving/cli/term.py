"""How commands speak to a terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import typer

from serving.errors import OperatorError


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """What an operator can mend is one sentence on stderr and exit code 1, without a stack trace."""
    try:
        yield
    except OperatorError as e:
        typer.echo(f"error: {e}", err=True)
        raise typer.Exit(1) from None

"""How a command ends: its exit code, and one line on stderr for what went wrong.

Exit codes are those of sysexits.h, so that a shell or cron can tell what to do: 0 accepted (or all is
well), 65 the request is wrong, 77 it is not allowed, 75 Redis did not take it (try again, with the same
key), 78 the configuration is wrong, 66 nothing matches what was asked for, 1 the request failed (with
--wait), what was named is not there, or a check failed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import NoReturn, ParamSpec, TypeVar

import click

from .errors import BrokerUnavailable, ConfigurationError, DagrelayError, InvalidRequest, NotAllowed

EX_FAILED, EX_DATAERR, EX_NOINPUT, EX_TEMPFAIL, EX_NOPERM, EX_CONFIG = 1, 65, 66, 75, 77, 78

P = ParamSpec("P")
R = TypeVar("R")


def told(command: Callable[P, R]) -> Callable[P, R]:
    """End a command with one line on stderr and the exit code of what went wrong."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except NotAllowed as exc:
            fail(str(exc), EX_NOPERM)
        except InvalidRequest as exc:
            fail(str(exc), EX_DATAERR)
        except BrokerUnavailable as exc:
            fail(str(exc), EX_TEMPFAIL)
        except ConfigurationError as exc:
            fail("\n".join(exc.mistakes), EX_CONFIG)
        except DagrelayError as exc:
            fail(f"{type(exc).__name__}: {exc}", EX_FAILED)

    return run


def fail(text: str, code: int) -> NoReturn:
    """Say why on stderr, and end with this code."""
    for line in text.splitlines():
        click.echo(f"dagrelay: {line}", err=True)
    sys.exit(code)

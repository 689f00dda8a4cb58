"""Several processes that train together: an error in one of them must end all, and soon."""

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import jax


@contextlib.contextmanager
def abort_on_error() -> Iterator[None]:
    """Ends this process at once, if an error is raised inside and other processes train with it.

    Processes that train together wait for each other: in every step, and when they end. If one of them raises an error
    between two steps, the others wait for it in the next step, and it waits for them at its end: by JAX's defaults for
    five minutes, and then others print other errors. In this context, the process prints its traceback and ends with
    the exit code 1. It does not wait, so the steps of the others fail within seconds on CPUs. Where JAX notices only by
    missing heartbeats, they fail within the `heartbeat_timeout_seconds` of `jax.distributed.initialize`.

    `fit` does this by itself while it trains. It raises errors that all processes find, such as a loss that is not
    finite, and errors that come out of the batches: make batches with `lockstep`, which tells all processes of an error
    in one. Put the context around a loop of your own. With one process it changes nothing: the error is raised. Ctrl-C
    is raised as ever. Functions of `atexit` do not run; `sys.excepthook` does, for tools that report errors.

    >>> import jaxheads as jh
    >>> with jh.training.abort_on_error():
    ...     for batch in []:
    ...         state, out = step(state, batch)
    """
    with aborting([]):
        yield


@contextlib.contextmanager
def aborting(passed: list[Exception]) -> Iterator[None]:
    """Does `abort_on_error`, but raises the errors in a list, which `let_through` and others fill."""
    try:
        yield
    except (Exception, SystemExit) as error:
        is_end = isinstance(error, SystemExit) and not error.code
        if is_end or jax.process_count() == 1 or any(error is other for other in passed):
            raise
        _abort(error)


def _abort(error: BaseException) -> None:
    """Ends the process. Whatever a hook or a handler does before, nothing may keep the process from its end."""
    try:
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        try:
            print(
                f"Process {jax.process_index()} of {jax.process_count()} ends with this {type(error).__name__}, and "
                "does not wait for the others. If it says that another process is gone, the output of that one has "
                "the cause.",
                file=sys.stderr,
            )
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
        finally:
            os._exit(1)


def let_through(batches: Iterable[Any], passed: list[Exception]) -> Iterator[Any]:
    """Gives batches on, and notes the error that making one has raised."""
    try:
        yield from batches
    except Exception as error:
        passed.append(error)
        raise

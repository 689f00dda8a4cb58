"""Several processes that train together: an error in one of them must end all, and soon."""

import contextlib
import logging
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

    `fit` does this by itself, except for errors that come out of the batches: `lockstep` tells all processes of those.
    Put it around a loop of your own. With one process it changes nothing: the error is raised. Functions of `atexit` do
    not run; `sys.excepthook` does, for tools that report errors.

    >>> import jaxheads as jh
    >>> with jh.training.abort_on_error():
    ...     for batch in []:
    ...         state, out = step(state, batch)
    """
    with aborting([]):
        yield


@contextlib.contextmanager
def aborting(passed: list[Exception]) -> Iterator[None]:
    """Does `abort_on_error`, but raises the errors in a list, which `let_through` fills."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if jax.process_count() == 1 or any(error is other for other in passed):
            raise
        sys.excepthook(type(error), error, error.__traceback__)
        print(
            f"Process {jax.process_index()} of {jax.process_count()} ends with this {type(error).__name__}, and does "
            "not wait for the others. If it says that another process is gone, the output of that one has the cause.",
            file=sys.stderr,
        )
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(1)


def let_through(batches: Iterable[Any], passed: list[Exception]) -> Iterator[Any]:
    """Gives batches on, and notes the error that making one has raised."""
    try:
        yield from batches
    except Exception as error:
        passed.append(error)
        raise

"""Makes a head ready: binds its parameters, and tries the head once if it does not declare its `coupling`."""

import dataclasses
import threading
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.contract import AbstractHead
from jaxheads.engine import trees
from jaxheads.engine.elements import observations_of, see
from jaxheads.numerics import brief, fields
from jaxheads.numerics.batch import Batch, Devices
from jaxheads.numerics.kept import per_head
from jaxheads.numerics.reduction import Reduction

ROWS = 4
LOOKS = ("row", "sequence", "batch")


def ready(head: Any, params: Mapping[str, Any] | None) -> Any:
    """Returns the head with its parameters, for a loss or metrics. Refuses an undeclared dependence between rows."""
    for leaf in trees.leaves(head):
        check(leaf)
    return bound(head, params)


def bound(head: Any, params: Mapping[str, Any] | None) -> Any:
    """Returns the head with its parameters, or raises an error that says how to give them."""
    head = head if params is None else fields.bind(head, params)
    if missing := fields.missing(head):
        raise ValueError(
            f"{type(head).__name__} has learned or running fields without values: {missing}. Make them with "
            "params = head.init(key) (and head.init_state()), then pass params=params, or use head.bind(params)."
        )
    return head


def check(head: AbstractHead) -> None:
    """Refuses a head whose rows depend on each other, if it does not declare this."""
    if not brief.is_one_of(head.coupling, (None, *LOOKS)):
        raise ValueError(f"{type(head).__name__}.coupling must be one of {LOOKS}. Given {head.coupling!r}.")
    found = _find_coupling(head)
    if found in ("loss", "observation"):
        raise ValueError(
            f"{type(head).__name__} gives a row another {found} when the other rows change, and does not declare that "
            'rows look at each other. Declare it in the class: coupling = "batch" (take the rows of all devices from '
            'rows.devices.all(x), and which of them exist from rows), or coupling = "sequence" for the steps of a '
            "sequence. If rows should not matter to each other, mend the formula: sums and means go over the last axis "
            "alone."
        )


def check_parts_add_up(head: AbstractHead) -> None:
    """Refuses to cut a batch into parts for a head whose rows depend on each other, or for which this is unknown."""
    for leaf in trees.leaves(head):
        if leaf.coupling == "batch":
            raise ValueError(
                f"The loss of a row of {type(leaf).__name__} looks at the other rows of its batch, and pairs across "
                "the parts of a batch would be lost: micro_batches and head.divisor are not for it. Given "
                f"{leaf!r}. Take the whole batch at once."
            )
        if _find_coupling(leaf) == UNKNOWN:
            raise ValueError(
                f"Whether rows of {type(leaf).__name__} look at each other is not known: it failed on labels drawn "
                'from its label_spec. Declare it in the class: coupling = "row" where they do not. Micro-batches and '
                f"head.divisor need to know. Given {leaf!r}."
            )


UNKNOWN = "unknown"


def _find_coupling(head: AbstractHead) -> str | None:
    """Tries a head, and returns which result of a row changes with other rows; None if none does, or without a trial.

    A head that reads features is trusted without a trial: its columns are unknown.
    """
    return _try_plain(fields.unbound(head)) if head.coupling is None and not head.reads_features else None


class _Reported(Devices):
    """Devices for a trial, which reports that a hook asks for rows of other devices."""

    def sum(self, x: Any) -> Any:
        """Raises."""
        raise _AsksForOthers

    def all(self, x: Any) -> Any:
        """Raises."""
        raise _AsksForOthers


class _AsksForOthers(Exception):
    """Raised in a trial: only a head whose rows look at each other asks for the rows of other devices."""


@per_head
def _try_plain(head: AbstractHead) -> str | None:
    """Tries one head for all heads that differ only in name, reduction, weight column or bootstrap."""
    plain = {"name": None, "loss_reduction": Reduction.SUM, "weight_column": None, "bootstrap": None}
    own = {field.name for field in dataclasses.fields(head)}
    return _try(dataclasses.replace(head, **{name: value for name, value in plain.items() if name in own}))


@per_head
def _try(head: AbstractHead) -> str | None:
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(_compare_batches(head))
        except Exception as error:
            found.append(error)

    # The trial runs in its own thread: the call may be inside a trace, or under a mesh.
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def _compare_batches(head: Any) -> str | None:
    """Compares two batches of the same shape and first row: the head must give this row the same results in both."""
    from jaxheads.engine.samplers import sample_labels, sample_logits

    rng, key = np.random.default_rng(0), jax.random.key(0)

    def nudged(x: jax.Array) -> jax.Array:
        # A learned value may start where other rows have no effect yet.
        return x + 0.1 * jax.random.normal(key, x.shape, x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    def values(labels: Any, logits: Any, weights: Any, where: Any) -> dict[str, Any]:
        learned = jax.tree.map(nudged, fields.init(head, key))
        bound = fields.bind(head, fields.merge(learned, fields.init_state(head)))
        batch = Batch(labels, logits, weights, (where,), key=key if head.samples else None, rank=1)
        seen = see(bound, batch, _Reported())
        return {"loss": seen.term, "observation": tuple(observations_of(bound, seen.elements).values())}

    batches = [(sample_labels(head, rng, (ROWS,)), sample_logits(head, rng, (ROWS,))) for _ in range(2)]
    second = jax.tree.map(lambda x, other: np.concatenate([x[:1], other[1:]]), *batches)
    weights = rng.uniform(0.5, 2, (2, ROWS, 1)).astype(np.float32)
    weights[1, 0] = weights[0, 0]
    where = np.arange(ROWS)[:, None]
    step = jax.jit(values)
    # A margin or a clip may be flat at large logits, and a formula may forget small ones.
    for scale in np.array([1, 0.1], np.float32):
        labels, logits = zip(batches[0], second, strict=True)
        logits = jax.tree.map(lambda x, scale=scale: scale * x, logits)
        try:
            first = jax.device_get(step(labels[0], logits[0], weights[0], where != 1))
        except _AsksForOthers:
            return "loss"
        except Exception:  # illegal draws; a fault of the head itself shows in the call
            return UNKNOWN
        other = jax.device_get(step(labels[1], logits[1], weights[1], where != 2))
        for name, found in first.items():
            pairs = zip(jax.tree.leaves(found), jax.tree.leaves(other[name]), strict=True)
            if not all(np.allclose(a[0], b[0], rtol=1e-4, atol=1e-5, equal_nan=True) for a, b in pairs):
                return name
    return None

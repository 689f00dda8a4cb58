"""The evaluation of a batch: its loss, its metrics and the next running state, from one pass over its rows."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from jaxheads.contract import AbstractHead
from jaxheads.engine import losing, measuring, trees
from jaxheads.engine.elements import clean
from jaxheads.metrics import Metrics
from jaxheads.numerics import fields, hooks, inputs
from jaxheads.numerics.batch import Batch, Devices
from jaxheads.numerics.kept import programs_per_head, twin_of


class Evaluated(NamedTuple):
    """A batch with its loss, from which metrics, state and summaries can be read.

    Attributes:
        batch: the batch.
        seen: the elements and losses that the head made from it.
        sums: the sums of its loss, over all devices.
        regularization: the losses that are added, or None.
    """

    batch: Batch
    seen: Any
    sums: Any
    regularization: list[Any] | None


def evaluate(
    head: AbstractHead, batch: Batch, regularization: list[Any] | None, axis_name: Any
) -> tuple[jax.Array, Evaluated]:
    """Returns the regularized loss of a batch, over all devices, and the values for all further results."""
    seen, sums = losing.see_loss(head, batch, Devices(axis_name))
    loss = losing.value(head, batch, sums)
    if regularization is not None:
        loss = loss + inputs.add_scalars(regularization)
    return loss, Evaluated(batch, seen, sums, regularization)


def metrics_of(head: AbstractHead, found: Evaluated, axis_name: Any) -> Metrics:
    """Returns the metrics of an evaluated batch, for the rows of this device."""
    state = measuring.measure(head, found.batch, found.regularization, axis_name, found.seen)
    return Metrics(state, twin_of(fields.unbound(head)), found.regularization is not None)


def without_gradient(found: Evaluated) -> Evaluated:
    """Returns the same values without gradient, for a caller who may differentiate the loss afterwards."""
    return jax.tree.map(measuring.without_gradient, found)


def summaries_of(head: AbstractHead, found: Evaluated, loss: jax.Array) -> dict[str, jax.Array]:
    """Returns the scalars, by tag, that the original wrote in training."""
    losses = found.regularization
    regularization = None if losses is None else inputs.add_scalars(losses)
    return losing.summaries(head, found.batch, found.sums, loss, regularization)


def loss_of(head: AbstractHead, batch: Batch, axis_name: Any = None) -> jax.Array:
    """Returns the loss of a batch, without regularization."""
    return evaluate(head, batch, None, axis_name)[0]


def advance(head: AbstractHead, batch: Batch, axis_name: Any, seen: Any = None) -> dict[str, Any]:
    """Returns the new running state of a bound head after a batch, checked."""
    new = fields.carry(head, fields.state_of(head), _move_state(head, batch, seen, Devices(axis_name)))
    fields.check_state(head, new, f"{type(head).__name__}.advance", "those of the heads inside it included")
    return jax.tree.map(jax.lax.stop_gradient, new)


def _move_state(head: Any, batch: Batch, seen: Any, devices: Devices) -> Mapping[str, Any]:
    """Returns the values of the running state that change."""
    if not fields.has_state(head):
        return {}
    if batch.parts is None:
        elements = clean(head, batch, devices) if seen is None else seen.elements
        return hooks.call(head, "advance", elements.labels, elements.logits, rows=elements.rows)
    own = {name: None for name in head.parts()} if seen is None else seen
    move = functools.partial(_move_state, devices=devices)
    moved = trees.each_group(head, move, trees.parts_of(head, batch), own).by_name()
    # The state is nested by the names of fields, or by the names of heads in a list.
    named = {id(inner): name for name, inner in fields.children(head).items()}
    return {named[id(inner)]: moved[name] for name, inner in head.parts().items() if fields.has_state(inner)}


class Programs(NamedTuple):
    """The compiled functions of a head. In the place of the head they take its leaves, the values that it is bound to.

    JAX remembers the structures of arguments for ever, and a head's structure holds its configuration.
    """

    loss: Any
    measure: Any
    update: Any


@programs_per_head
def _compile(_: Any, structure: Any) -> Programs:
    """Compiles the functions of an unbound head, for the structure that it has if it is bound. They die with it."""

    def loss(leaves: Any, batch: Batch, axis_name: Any) -> jax.Array:
        return loss_of(jax.tree.unflatten(structure, leaves), batch, axis_name)

    def measure(leaves: Any, batch: Batch, losses: Any, axis_name: Any) -> jax.Array:
        return measuring.measure(jax.tree.unflatten(structure, leaves), batch, losses, axis_name)

    def update(state: jax.Array, leaves: Any, batch: Batch, losses: Any, axis_name: Any) -> jax.Array:
        return measuring.update(state, jax.tree.unflatten(structure, leaves), batch, losses, axis_name)

    return Programs(
        jax.jit(loss, static_argnums=2), jax.jit(measure, static_argnums=3), jax.jit(update, static_argnums=4)
    )


def _programs(owner: Any, head: Any) -> tuple[list[Any], Programs]:
    """Returns the leaves of a head, and its compiled functions. These live as long as its `owner`, the unbound head."""
    leaves, structure = jax.tree.flatten(head)
    return leaves, _compile(fields.unbound(owner), structure)


def _is_inside(axis_name: Any, *values: Any) -> bool:
    """Tells whether a call is a part of a function that is compiled or mapped already."""
    return axis_name is not None or inputs.is_traced(values)


def loss(owner: Any, head: Any, batch: Batch, axis_name: Any) -> jax.Array:
    """Does `loss_of`, in compiled code of its own unless it is inside other compiled code."""
    if _is_inside(axis_name, head, batch):
        return loss_of(head, batch, axis_name)
    leaves, programs = _programs(owner, head)
    return programs.loss(leaves, batch, axis_name)


def measure(owner: Any, head: Any, batch: Batch, losses: Any, axis_name: Any) -> jax.Array:
    """Does `measuring.measure`, likewise."""
    if _is_inside(axis_name, head, batch, losses):
        return measuring.measure(head, batch, losses, axis_name)
    leaves, programs = _programs(owner, head)
    return programs.measure(leaves, batch, losses, axis_name)


def update(state: Any, owner: Any, head: Any, batch: Batch, losses: Any, axis_name: Any) -> jax.Array:
    """Does `measuring.update`, likewise."""
    if _is_inside(axis_name, state, head, batch, losses):
        return measuring.update(state, head, batch, losses, axis_name)
    leaves, programs = _programs(owner, head)
    return programs.update(state, leaves, batch, losses, axis_name)

"""From a batch to the packed sums of a metric state; on a CPU, large batches are processed tile by tile."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from jaxheads.contract import AVERAGE_LOSS, AbstractHead
from jaxheads.engine import reading, trees
from jaxheads.engine.elements import Seen, average_term_of, observations_of, see_for_metrics
from jaxheads.losses import terms
from jaxheads.metrics import Count, Mean, Membership, Metrics, Observation, reduced
from jaxheads.metrics.base import COUNT
from jaxheads.metrics.reading import make_stamp
from jaxheads.numerics import fields, inputs, masking, meshes, pairs, tiles
from jaxheads.numerics.batch import Batch, Devices, Elements, mean_of_entries
from jaxheads.numerics.linear import LinearLogits
from jaxheads.numerics.reduction import Reduction
from jaxheads.numerics.tiles import Late


def measure(
    head: AbstractHead, batch: Batch, losses: list[Any] | None, axis_name: Any = None, seen: Any = None
) -> jax.Array:
    """Returns the packed sums `[slots, 1]` of this device's rows; regularization follows the first sum, if it is kept.

    Args:
        losses: regularization losses; None if they are not kept.
        axis_name: the axis of the other devices, for heads that look at their rows. The sums are of this device alone.
        seen: the result of `see` for the batch, if it exists already. It is an auxiliary output of
            `jax.value_and_grad`, so it has no gradient to stop.
    """
    if seen is None:
        given = head, batch, losses
        # What heads share stays one array.
        stopped = {id(x): without_gradient(x) for x in jax.tree.leaves(given)}
        head, batch, losses = jax.tree.map(lambda x: stopped[id(x)], given)
    bad, *sums = _sums(head, batch, seen, Devices(axis_name), inside=False)
    kept = [] if losses is None else [jnp.stack([inputs.add_scalars(losses), jnp.float32(1)])]
    return jnp.concatenate([bad, make_stamp(fields.unbound(head)), *kept, *sums])[:, None]


def clear(metrics: Metrics, when: jax.Array) -> Metrics:
    """Returns the metrics of a batch; where `when` is True, those of no rows, with the number of bad elements alone."""
    slot = jax.lax.broadcasted_iota(jnp.int32, metrics.state.shape, metrics.state.ndim - 2)
    return dataclasses.replace(metrics, state=jnp.where(when & (slot > 0), jnp.float32(0), metrics.state))


def without_gradient(x: Any) -> Any:
    """Returns the same value without gradient. A random key is returned unchanged: it has no gradient to stop."""
    return x if jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key) else jax.lax.stop_gradient(x)


def update(
    state: jax.Array, head: AbstractHead, batch: Batch, losses: list[Any] | None, axis_name: Any = None
) -> jax.Array:
    """Returns a state with one more batch added."""
    return pairs.add(state, measure(head, batch, losses, axis_name))


def _sums(head: Any, batch: Batch, seen: Any, devices: Devices, inside: bool) -> list[jax.Array]:
    """Returns the number of bad elements, then the sums of the observations, in the order of `reading.layout`.

    Where the head is inside a `MultiHead`, the divisor of its loss follows.
    """
    if batch.parts is None:
        return _sums_of_leaf(head, batch, seen, devices, inside)
    parts = trees.parts_of(head, batch)
    named = {name: inside or bool(name) for name in parts}
    of_each = functools.partial(_sums_of_part, devices=devices)
    found = trees.each_group(head, of_each, parts, named, *([] if seen is None else [seen]))
    bad = [sums[0] for sums in found.apart.values()] + [jnp.sum(stack.values[0], axis=0) for stack in found.stacks]
    # The state has the sums of one head after those of the other, in the order of the heads.
    place = {name: i for i, name in enumerate(head.parts())}
    pieces = {place[name]: sums[1:] for name, sums in found.apart.items()}
    for stack in found.stacks:
        rows, places = jnp.concatenate(stack.values[1:], axis=1), [place[name] for name in stack.names]
        starts = [i for i, at in enumerate(places) if i == 0 or at != places[i - 1] + 1]
        for start, end in itertools.pairwise([*starts, len(places)]):
            pieces[places[start]] = [rows[start:end].ravel()]
    return [functools.reduce(jnp.add, bad), *(x for i in sorted(pieces) for x in pieces[i])]


def _sums_of_part(head: Any, batch: Batch, inside: bool, seen: Any = None, *, devices: Devices) -> list[jax.Array]:
    return _sums(head, batch, seen, devices, inside)


def _sums_of_leaf(head: Any, batch: Batch, seen: Any, devices: Devices, inside: bool) -> list[jax.Array]:
    def whole(batch: Batch, seen: Any = None) -> list[Any]:
        return _sum_parts(head, batch, see_for_metrics(head, batch, devices, inside) if seen is None else seen, inside)

    rows = _rows_of_a_tile(head, batch)
    if rows is None:
        return tiles.finish(whole(batch, seen))
    lazy = isinstance(batch.logits, LinearLogits)
    cut = {
        "labels": batch.labels,
        "logits": batch.logits.hidden if lazy else batch.logits,
        "weights": batch.weights,
        "where": batch.where,
        "scale": batch.scale,
        "slices": batch.slices,
    }

    def by_tiles(cut: Any, batch: Batch) -> list[jax.Array]:
        def of_tile(tile: Any, fresh: jax.Array, i: jax.Array) -> list[Any]:
            logits = dataclasses.replace(batch.logits, hidden=tile["logits"]) if lazy else tile["logits"]
            lead = logits.shape[: len(logits.shape) - 1 if batch.rank is None else batch.rank]
            fresh = jnp.broadcast_to(fresh.reshape(-1, *[1] * len(lead)), (*lead, 1))
            key = None if batch.key is None else jax.random.fold_in(batch.key, i)
            return whole(batch.replace(**{**tile, "where": (*tile["where"], fresh), "logits": logits, "key": key}))

        return tiles.sum_over_rows(of_tile, cut, batch.logits.shape[0], rows)

    return jax.lax.platform_dependent(cut, batch, cpu=by_tiles, default=lambda _, batch: tiles.finish(whole(batch)))


def _rows_of_a_tile(head: Any, batch: Batch) -> int | None:
    """Returns the number of rows in a tile; None where a batch is not worth cutting, or must not be cut.

    Feature columns may have any shape, so a batch with feature columns is not cut.
    """
    if head.coupling not in ("row", "sequence") or isinstance(batch.logits, dict) or head.samples:
        return None
    if batch.features or len(batch.logits.shape) < (3 if head.coupling == "sequence" else 2):
        return None
    layout, _ = reading.slots_of(head)
    size = sum(observation.size for _, observation in layout.values() if not observation.is_late)
    rows = tiles.tile_rows(tuple(batch.logits.shape), size)
    return rows if rows is not None and meshes.is_local(batch.replace(key=None)) else None


def _sum_parts(head: AbstractHead, batch: Batch, seen: Seen, inside: bool) -> list[Any]:
    """Returns the number of bad elements, then the head's observations: as sums, or as values to reduce later."""
    elements = seen.elements
    observations = {AVERAGE_LOSS: Mean(*average_term_of(head, seen)), **observations_of(head, elements)}
    bad, weights, groups = elements.bad, elements.counted, None
    if head.slices is not None:
        observations[COUNT] = Count(weights)
        groups, stray = Membership.of(jnp.asarray(batch.slices), head.slices.n)
        # A row whose group does not exist is left out and counted as bad, as a row with an illegal label is.
        bad = bad | (stray & (weights != 0))
        weights = jnp.where(stray, jnp.zeros_like(weights), weights)
    replicas = None if head.bootstrap is None else jax.random.split(batch.key, head.bootstrap.replicas)
    parts: list[Any] = [masking.total(bad)[None]]
    for observation in observations.values():
        late = Late(observation, _weights_for(observation, weights, elements), groups, replicas, reduced)
        parts.append(late if observation.is_late else late.reduce())
    if inside:
        exists = elements.rows.exists
        # Where entries have masks of their own, only the bad entry is left out; else its whole row is left out.
        gone = bad if exists.shape[-1] == bad.shape[-1] else jnp.any(bad, -1, keepdims=True)
        rows = dataclasses.replace(elements.rows, exists=exists & ~gone)
        good = elements._replace(weights=weights, live=masking.is_not_zero(weights), rows=rows)
        of = terms.DivisorOf(seen.term, good, Reduction.of(head.loss_reduction))
        parts.append(Late(of, masking.ones_like(good.rows.exists[..., :1]), groups, replicas, reduced).reduce())
    return parts


def _weights_for(observation: Observation, weights: jax.Array, elements: Elements) -> jax.Array:
    """Returns the weights of an observation: for one value per row, the mean weight of the row's entries."""
    if weights.shape[-1] == 1 or any(jnp.shape(x)[-1] != 1 for x in jax.tree.leaves(observation)):
        return weights
    return mean_of_entries(weights, elements.rows.exists)

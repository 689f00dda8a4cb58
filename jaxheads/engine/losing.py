"""From elements to the loss: sums over rows and devices, their divisors, and the combination of several heads."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.contract import AbstractHead
from jaxheads.engine import gathering, trees
from jaxheads.engine.elements import Seen, debug_check, see
from jaxheads.engine.readiness import check_parts_add_up
from jaxheads.losses import terms
from jaxheads.metrics.base import LOSS, REGULARIZATION_LOSS, join_names
from jaxheads.numerics import masking, meshes, reduction
from jaxheads.numerics.batch import Batch, Devices
from jaxheads.numerics.reduction import Divisor, Reduction


def see_loss(head: Any, batch: Batch, devices: Devices) -> tuple[Any, Any]:
    """Returns the elements and losses of a batch, and the sums of its loss over all devices, as trees of heads.

    The learned values of the head are typed as varying over devices for these sums only.
    """
    seen = see(meshes.varying(head, devices.axis_name), batch, devices)
    return seen, _sum_over_devices(sums(head, seen), devices)


def sums(head: Any, seen: Any, silent: bool = False) -> Any:
    """Returns the `LossSums` of this device, for each head without heads inside; 0 for a silent head."""
    if isinstance(seen, Seen):
        if not silent:
            debug_check(head, seen.elements)
        found = terms.loss_sums(seen.term, seen.elements, Reduction.of(head.loss_reduction))
        return jax.tree.map(jnp.zeros_like, found) if silent else found
    quiet = {name: silent or name in head.silent for name in seen}
    return trees.each(head, sums, seen, quiet)


def _sum_over_devices(tree: Any, devices: Devices) -> Any:
    """Adds up the sums over devices, in one all-reduce."""
    if devices.axis_name is None:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten(list(devices.sum(jnp.stack(leaves))))


def value(head: Any, batch: Batch, sums: Any) -> jax.Array:
    """Returns the loss from sums over all devices. A normalizer is already global."""
    if batch.parts is not None:
        losses = trees.each(head, value, batch.parts, sums)
        shares = trees.each(head, lambda inner, part, own: share(inner, part, own)[0], batch.parts, sums)
        return head.combine(losses, shares)
    normalizer = batch.normalizer
    if normalizer is None or isinstance(normalizer, Divisor):
        by = sums.divisor if normalizer is None else normalizer.value
        if head.loss_reduction is Reduction.MEAN:
            # NaN, as for an illegal weight.
            by = jnp.where((by > 0) & (by < reduction.SMALLEST_SUM), jnp.nan, by)
        return sums.total if head.loss_reduction is Reduction.SUM else reduction.divide(sums.total, by)
    return reduction.divide(sums.total, jnp.asarray(normalizer, jnp.float32))


def share(head: Any, batch: Batch, sums: Any) -> tuple[jax.Array, jax.Array]:
    """Returns this part's share of its whole batch, for terms added once per batch; and whether any weight is not 0."""
    if batch.parts is not None:
        found = [*trees.each(head, share, batch.parts, sums).values()]
        shares, live = (jnp.stack(column) for column in zip(*found, strict=True))
        return reduction.divide(jnp.sum(shares), jnp.sum(live.astype(jnp.float32))), jnp.any(live)
    normalizer = batch.normalizer
    if isinstance(normalizer, Divisor):
        return reduction.divide(sums.live, normalizer.live), normalizer.live > 0
    part = jnp.float32(1)
    if normalizer is not None:
        part = reduction.divide(sums.divisor, jnp.asarray(normalizer, jnp.float32))
    live = jax.lax.gt(sums.live, np.float32(0))
    return masking.keep(live, part, 0), live


def divisor(head: AbstractHead, batch: Batch, axis_name: Any) -> Any:
    """Returns the divisor of the loss of a whole batch, over all devices."""
    check_parts_add_up(head)
    _, found = see_loss(head, _add_zero_logits(head, batch), Devices(axis_name))
    return _select_divisors(head, found)


def _add_zero_logits(head: Any, batch: Batch) -> Batch:
    """Returns a batch with logits, zeros if it has none. Labels count its elements; losses at zeros are discarded."""
    if batch.parts is not None:
        return batch.replace(parts=trees.each(head, _add_zero_logits, batch.parts))
    if batch.logits is not None:
        return batch
    lead = gathering.existing(batch).shape[:-1]

    def zeros(spec: Any) -> Any:
        if isinstance(spec, Mapping):
            return {key: zeros(inner) for key, inner in spec.items()}
        return jnp.zeros((*lead, *(n or 1 for n in gathering.event_of(spec))), jnp.float32)

    return batch.replace(logits=zeros(head.logits_spec))


def _select_divisors(head: Any, sums: Any) -> Any:
    if isinstance(sums, dict):
        return trees.unnested(trees.each(head, _select_divisors, sums))
    return Divisor(sums.divisor, sums.live)


def summaries(head: Any, batch: Batch, sums: Any, loss: jax.Array, regularization: Any) -> dict[str, jax.Array]:
    """Returns the scalars, by tag, that the original wrote in training: the loss, and that of each head inside."""
    if batch.parts is not None and "" in batch.parts:
        return summaries(head.parts()[""], batch.parts[""], sums[""], loss, regularization)
    if batch.parts is None:
        out, suffix = {join_names(LOSS, head.suffix): loss}, head.suffix
    else:
        out, suffix = {}, None
        for name, inner in head.parts().items():
            own = value(inner, batch.parts[name], sums[name])
            out |= {**summaries(inner, batch.parts[name], sums[name], own, None), join_names(LOSS, name): own}
        out = {**out, LOSS: loss}
    return out if regularization is None else {**out, join_names(REGULARIZATION_LOSS, suffix): regularization}

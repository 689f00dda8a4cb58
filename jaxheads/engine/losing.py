"""From elements to the loss: sums over rows and devices, their divisors, and the combination of several heads."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.contract import AbstractHead
from jaxheads.engine import gathering, trees
from jaxheads.engine.elements import Seen, debug_check, see
from jaxheads.engine.readiness import check_parts_add_up
from jaxheads.losses import terms
from jaxheads.losses.terms import LossSums
from jaxheads.metrics.base import LOSS, REGULARIZATION_LOSS, join_names
from jaxheads.numerics import masking, meshes, reduction
from jaxheads.numerics.batch import Batch, Devices
from jaxheads.numerics.reduction import Divisor, Reduction


def see_loss(head: Any, batch: Batch, devices: Devices) -> tuple[Any, Any]:
    """Returns the elements and losses of a batch, and the sums of its loss over all devices, as trees of heads.

    The learned values of the head are typed as varying over devices for these sums only.
    """
    seen, sums = _see_and_sum(meshes.varying(head, devices.axis_name), batch, False, devices)
    _check_elements(head, seen)
    return seen, _sum_over_devices(sums, devices)


def _see_and_sum(head: Any, batch: Batch, silent: bool, devices: Devices) -> tuple[Any, Any]:
    """Returns what a head sees, and the `sums` of this device; for a head with heads inside, as trees of heads."""
    if batch.parts is None:
        seen = see(head, batch, devices)
        return seen, sums(head, seen, silent)
    hushed = head.silent
    quiet = {name: silent or name in hushed for name in batch.parts}
    both = functools.partial(_see_and_sum, devices=devices)
    found = trees.each_group(head, both, trees.parts_of(head, batch), quiet)
    return found.map(lambda pair: pair[0]), found.map(lambda pair: pair[1])


def _check_elements(head: Any, seen: Any, silent: bool = False, stacked: bool = False) -> None:
    """Adds the checks for `checkify`. In the loop over equal heads they would be lost: its gradient drops them."""
    if isinstance(seen, Seen):
        if not silent:
            debug_check(head, seen.elements.bad, stacked)
        return
    inside, hushed = head.parts(), head.silent
    for name, own in seen.apart.items():
        _check_elements(inside[name], own, silent or name in hushed, stacked)
    for stack in seen.stacks:
        _check_elements(inside[stack.names[0]], stack.values, silent or stack.names[0] in hushed, True)


def sums(head: Any, seen: Seen, silent: bool = False) -> LossSums:
    """Returns the sums of this device for a head without heads inside; 0 for a silent head."""
    found = terms.loss_sums(seen.term, seen.elements, Reduction.of(head.loss_reduction))
    return jax.tree.map(jnp.zeros_like, found) if silent else found


def _sum_over_devices(tree: Any, devices: Devices) -> Any:
    """Adds up the sums over devices, in one all-reduce."""
    if devices.axis_name is None:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    flat = devices.sum(jnp.concatenate([jnp.ravel(x) for x in leaves]))
    ends = np.cumsum([x.size for x in leaves])[:-1]
    return structure.unflatten([x.reshape(y.shape) for x, y in zip(jnp.split(flat, ends), leaves, strict=True)])


class _Reduced(NamedTuple):
    """The loss of a head, from its sums over all devices.

    Attributes:
        loss: the loss.
        share: the part of its whole batch that the head has seen, for terms that are added once per batch.
        live: whether any weight is not 0.
    """

    loss: jax.Array
    share: jax.Array
    live: jax.Array


def value(head: Any, batch: Batch, sums: Any) -> jax.Array:
    """Returns the loss from sums over all devices. A normalizer is already global."""
    if batch.parts is None:
        return _divide(head, batch.normalizer, sums)
    return _combine(head, _reduce_inside(head, batch.normalizers, sums))


def _combine(head: Any, inside: Mapping[str, _Reduced]) -> jax.Array:
    losses, shares = ({name: found[i] for name, found in inside.items()} for i in (0, 1))
    return head.combine(losses, shares)


def _reduce_inside(head: Any, normalizers: Any, sums: trees.ByGroup) -> dict[str, _Reduced]:
    """Returns the losses of the heads inside, in their order."""
    found = trees.each_group(head, _reduce, normalizers, sums, at_once=True).by_name()
    return {name: found[name] for name in head.parts()}


def _reduce(head: Any, normalizer: Any, sums: Any) -> _Reduced:
    """Returns the loss of a head; its normalizer is a dict by name if there are heads inside."""
    if isinstance(sums, LossSums):
        return _Reduced(_divide(head, normalizer, sums), *_share(normalizer, sums))
    inside = _reduce_inside(head, normalizer, sums)
    shares, live = (jnp.stack([found[i] for found in inside.values()]) for i in (1, 2))
    part = reduction.divide(jnp.sum(shares), jnp.sum(live.astype(jnp.float32)))
    return _Reduced(_combine(head, inside), part, jnp.any(live))


def _divide(head: Any, normalizer: Any, sums: LossSums) -> jax.Array:
    """Returns the loss of a head without heads inside."""
    if normalizer is None or isinstance(normalizer, Divisor):
        by, live = (sums.divisor, sums.live) if normalizer is None else normalizer
        if head.loss_reduction is Reduction.MEAN:
            # NaN, as for an illegal weight. However many they are: the limit is for their mean.
            by = jnp.where((by > 0) & (by < reduction.SMALLEST_SUM * live), jnp.nan, by)
        return sums.total if head.loss_reduction is Reduction.SUM else reduction.divide(sums.total, by)
    return reduction.divide(sums.total, jnp.asarray(normalizer, jnp.float32))


def _share(normalizer: Any, sums: LossSums) -> tuple[jax.Array, jax.Array]:
    """Returns the share of its whole batch that a head without heads inside has seen, and whether any weight lives."""
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
    if isinstance(sums, LossSums):
        return Divisor(sums.divisor, sums.live)
    return trees.unnested(trees.each(head, _select_divisors, sums.by_name()))


def summaries(head: Any, batch: Batch, sums: Any, loss: jax.Array, regularization: Any) -> dict[str, jax.Array]:
    """Returns the scalars, by tag, that the original wrote in training: the loss, and that of each head inside."""
    if batch.parts is not None and "" in batch.parts:
        return summaries(head.parts()[""], batch.parts[""], sums.by_name()[""], loss, regularization)
    if batch.parts is None:
        out, suffix = {join_names(LOSS, head.suffix): loss}, head.suffix
    else:
        out, suffix, of_each, losses = {}, None, sums.by_name(), _reduce_inside(head, batch.normalizers, sums)
        for name, inner in head.parts().items():
            own = losses[name].loss
            out |= {**summaries(inner, batch.parts[name], of_each[name], own, None), join_names(LOSS, name): own}
        out = {**out, LOSS: loss}
    return out if regularization is None else {**out, join_names(REGULARIZATION_LOSS, suffix): regularization}

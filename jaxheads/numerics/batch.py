"""A batch on its way from a call to a formula: `Given` by users, `Batch` after the checks, `Rows` for hooks."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxheads.numerics import masking, meshes


class _Absent:
    """The type of `ABSENT`."""

    def __repr__(self) -> str:
        return "ABSENT"


ABSENT: Any = _Absent()


class Mask(NamedTuple):
    """A mask of the elements that exist, and the user's name for it."""

    value: Any
    what: str = "where"


class Masks(tuple[Mask, ...]):
    """Several masks, such as those of a sequence and of the user. All must hold."""

    @classmethod
    def of(cls, where: Any) -> "Masks":
        """Makes masks from one `where`, from several masks, or from None."""
        if isinstance(where, Masks):
            return where
        return cls(() if where is None else (Mask(where),))


@dataclasses.dataclass(frozen=True)
class Given:
    """The inputs of a call, before any check. A head with heads inside distributes them with `route`.

    Attributes:
        labels, logits: as the call got them; `ABSENT` where the call has none (predictions have no labels).
        features, weights, where, normalizer: as for `head.loss`; `where` may be `Masks` already.
        keys: the keys of the predictions that are asked for.
        columns: the features in which slices are looked up, where `features` holds only a part of them.
        with_slices: whether slices are looked up.
        divides: whether the loss is divided by the number of elements, for which weights are no mask.
        key: a random key, for replicas and for heads that sample.
        check: as for `head.loss`.
    """

    labels: Any = ABSENT
    logits: Any = ABSENT
    features: Any = None
    weights: Any = None
    where: Any = None
    normalizer: Any = None
    keys: Any = None
    columns: Any = None
    with_slices: bool = False
    divides: bool = False
    key: Any = None
    check: bool | None = None

    def replace(self, **changes: Any) -> "Given":
        """Returns a copy with other values."""
        return dataclasses.replace(self, **changes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """A checked batch, which enters compiled code. For a head with heads inside it holds one batch for each of them.

    Attributes:
        labels: as the label spec says, with their last axis.
        logits: float32, `LinearLogits`, or a dict of them; None where `engine.gathering.at` adds them later.
        weights: float32 `[..., 1]`, or of the shape of the logits; None for 1.
        where: masks of the same shapes, all of which must hold.
        features: the numeric columns, if the head reads any.
        slices: ids `[..., 1]`, or a membership matrix; None where they are not needed.
        scale: how often each element counts in the loss, `[..., 1]`; None for once.
        normalizer: a number that replaces the divisor of the loss; None to keep the divisor.
        key: a random key; None where there is none.
        parts: the batches of the heads inside, by name; None for a head without heads inside.
        rank: how many leading axes the elements have; None for all axes of the logits except the last.
    """

    labels: Any = None
    logits: Any = None
    weights: Any = None
    where: tuple[Any, ...] = ()
    features: Any = None
    slices: Any = None
    scale: Any = None
    normalizer: Any = None
    key: Any = None
    parts: dict[str, "Batch"] | None = None
    rank: int | None = dataclasses.field(default=None, metadata={"static": True})

    def replace(self, **changes: Any) -> "Batch":
        """Returns a copy with other values."""
        return dataclasses.replace(self, **changes)

    @property
    def normalizers(self) -> Any:
        """The normalizer; for a head with heads inside, a dict of their normalizers."""
        if self.parts is None:
            return self.normalizer
        return {name: part.normalizers for name, part in self.parts.items()}

    def map_leaves(self, function: Callable[["Batch"], "Batch"]) -> "Batch":
        """Applies `function` to this batch, or to the batches of all heads inside, at any depth."""
        if self.parts is None:
            return function(self)
        return self.replace(parts={name: part.map_leaves(function) for name, part in self.parts.items()})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices that share a batch: along a mapped axis, or along none, where JAX itself sees all rows.

    Attributes:
        axis_name: the axis of `shard_map` or `pmap`; None elsewhere; `()` if every device has all rows.
        asked_by: the name of a head whose rows look at each other: it needs the axis.
    """

    axis_name: Any = dataclasses.field(default=None, metadata={"static": True})
    asked_by: str | None = dataclasses.field(default=None, metadata={"static": True})

    def sum(self, x: Any) -> Any:
        """Returns the sum over devices of `x`, which is the sum of a device's own rows."""
        self._check_axis(x)
        return meshes.psum(x, self.axis_name)

    def all(self, x: jax.Array) -> jax.Array:
        """Returns the rows of all devices, `[n, d]`, of an array `[..., d]` with one row for each row of the batch."""
        self._check_axis(x)
        return meshes.all_rows(x, self.axis_name)

    def _check_axis(self, x: Any) -> None:
        """Refuses to take the rows of one device for all, inside `shard_map` or `pmap`."""
        if self.asked_by is None or self.axis_name is not None or not (axes := meshes.axes_of_rows(x)):
            return
        raise ValueError(
            f"Rows of {self.asked_by} look at the rows of all devices. Given no axis_name inside shard_map or pmap, "
            f"where devices may have other rows along {' and '.join(axes)}. Pass axis_name= (and give pmap an "
            "axis_name); axis_name=() says that every device has all rows."
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """The facts that a hook may know about its rows, beside labels and logits. A hook with an argument `rows` gets it.

    Attributes:
        exists: bool `[..., 1]`; for a head that takes masks of single logits also `[..., d]`.
        weights: float32, of the same shapes: how often a row counts; 0 for a row that is masked, hidden or illegal.
        columns: the numeric columns of `features`, 1 in masked rows; None where the head reads none.
        groups: 1 inside and 0 outside each of the head's slices, `[..., n]`; None unless `reads_slices`.
        scale: the share of its sequence that a row has in the loss, `[..., 1]`; None for 1. `weights` include it.
        key: a random key; None where the call had none.
        prepared: the result of the hook `prepare`.
        devices: `rows.devices.sum(x)` and `rows.devices.all(x)`: over the rows of every device.
    """

    exists: jax.Array
    weights: jax.Array
    columns: Any = None
    groups: Any = None
    scale: Any = None
    key: Any = None
    prepared: Any = None
    devices: Devices = Devices()

    @property
    def features(self) -> Mapping[Any, Any]:
        """The numeric columns of `features`, 1 in masked rows."""
        if self.columns is None:
            raise ValueError(
                "rows.features was read, and no features were gathered. Declare it in the class, reads_features = "
                "True, and pass features= to the call, to predictions too."
            )
        return self.columns


class Elements(NamedTuple):
    """The elements of a batch as formulas get them. No value in it can poison a formula.

    Attributes:
        labels: as the label spec says; the fill where masked or illegal.
        logits: float32, 0 where masked; lazy where the head takes lazy logits.
        weights: float32 `[..., 1]` or `[..., d]`; 0 where masked, 1 where illegal.
        live: bool, of the shape of the weights: where they are not 0. It is the mask itself if there are no weights.
        bad: bool, of the same shape: True for unmasked elements with an illegal label or weight.
        rows: the facts that hooks may know beside labels and logits.
    """

    labels: Any
    logits: Any
    weights: jax.Array
    live: jax.Array
    bad: jax.Array
    rows: Rows

    @property
    def counted(self) -> jax.Array:
        """The weights for metrics: bad elements get 0."""
        return masking.choose(self.bad, jnp.zeros_like(self.weights), self.weights)

    def of_whole_rows(self) -> "Elements":
        """Returns the elements with one weight for each row, for losses of one value for each row.

        Where entries have masks or weights, it is the mean weight of the entries that exist. So a row counts once, for
        any number of entries.
        """
        if self.weights.shape[-1] == 1 and self.rows.exists.shape[-1] == 1:
            return self
        exists = jnp.broadcast_to(self.rows.exists, jnp.broadcast_shapes(self.rows.exists.shape, self.weights.shape))
        row = jnp.any(exists, -1, keepdims=True)
        weights = mean_of_entries(self.weights, exists)
        rows = dataclasses.replace(self.rows, exists=row)
        live, bad = (jnp.any(mask, -1, keepdims=True) for mask in (self.live, self.bad))
        return Elements(self.labels, self.logits, weights, live, bad, rows)


def mean_of_entries(weights: jax.Array, exists: jax.Array) -> jax.Array:
    """Returns the mean weight `[..., 1]` of the entries of a row that exist."""
    there = jnp.broadcast_to(exists, weights.shape).astype(jnp.float32) * masking.ones_like(weights)
    n = jnp.sum(there, -1, keepdims=True)
    return jnp.sum(weights * there, -1, keepdims=True) / jnp.maximum(n, jnp.ones_like(n))

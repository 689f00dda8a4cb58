"""A batch on its way from a call to a formula: `Given` as users pass it, `Batch` checked, `Rows` as hooks see it."""

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
    """Which elements exist, and what the user calls it."""

    value: Any
    what: str = "where"


class Masks(tuple[Mask, ...]):
    """Several masks, all of which must hold: a sequence's and the user's."""

    @classmethod
    def of(cls, where: Any) -> "Masks":
        """From one `where`, from several masks, or from None."""
        if isinstance(where, Masks):
            return where
        return cls(() if where is None else (Mask(where),))


@dataclasses.dataclass(frozen=True)
class Given:
    """What a call was given, before anything is checked. A head with heads inside deals it out, by `route`.

    Attributes:
        labels, logits: as the call got them; `ABSENT` where the call has none (predictions have no labels).
        features, weights, where, normalizer: as for `head.loss`; `where` may be `Masks` already.
        keys: of predictions.
        columns: the features in which slices are looked up, where `features` holds only a part of them.
        with_slices: whether slices are looked up.
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
    key: Any = None
    check: bool | None = None

    def replace(self, **changes: Any) -> "Given":
        """The same with other values."""
        return dataclasses.replace(self, **changes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """A checked batch, which enters compiled code. Of a head with heads inside it holds a batch for each of them.

    Attributes:
        labels: as the label spec says, with their last axis.
        logits: float32, `LinearLogits`, or a dict of them; None where they come later, by `engine.gathering.at`.
        weights: float32 `[..., 1]`, or of the shape of the logits; None for 1.
        where: masks of the same shapes, all of which must hold.
        features: the numeric columns, if the head reads any.
        slices: ids `[..., 1]`, or a membership matrix; None where nobody asks for them.
        scale: how often each element counts in the loss, `[..., 1]`; None for once.
        normalizer: what takes the place of the divisor of the loss; None for nothing.
        key: a random key; None where there is none.
        parts: the batches of the heads inside, by name; None of a head without.
        rank: how many leading axes the elements have; None for all but the last of the logits.
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
        """The same with other values."""
        return dataclasses.replace(self, **changes)

    def map_leaves(self, function: Callable[["Batch"], "Batch"]) -> "Batch":
        """`function` of this batch, or of those of all heads inside, however deep."""
        if self.parts is None:
            return function(self)
        return self.replace(parts={name: part.map_leaves(function) for name, part in self.parts.items()})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices over which a batch is spread: along a mapped axis, or along none, where JAX sees all rows itself.

    Attributes:
        axis_name: of `shard_map` or `pmap`; None elsewhere.
    """

    axis_name: Any = dataclasses.field(default=None, metadata={"static": True})

    def sum(self, x: Any) -> Any:
        """The sum over devices of what each has added up over its rows."""
        return meshes.psum(x, self.axis_name)

    def all(self, x: jax.Array) -> jax.Array:
        """The rows of every device, `[n, d]`, of an array `[..., d]` with one row for each row of the batch."""
        return meshes.all_rows(x, self.axis_name)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """What a hook may know of its rows beside labels and logits: it gets this where it has an argument `rows`.

    Attributes:
        exists: bool `[..., 1]`; of a head that takes masks of single logits also `[..., d]`.
        weights: float32, of the same shapes: how often a row counts, 0 for one that is masked, hidden or illegal.
        columns: the numeric columns of `features`, 1 in masked rows; None where the head reads none.
        groups: 1 inside and 0 outside of each of the head's slices, `[..., n]`; None unless `reads_slices`.
        scale: the share of its sequence that a row counts as in the loss, `[..., 1]`; None for once. `weights` have it.
        key: a random key; None where the call had none.
        prepared: what the hook `prepare` made.
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
    """The elements of a batch as formulas are given them: nothing in it can poison a formula.

    Attributes:
        labels: as the label spec says; the fill where masked or illegal.
        logits: float32, 0 where masked; lazy where the head takes that.
        weights: float32 `[..., 1]` or `[..., d]`; 0 where masked, 1 where illegal.
        bad: bool, of the shape of the weights: unmasked, but with an illegal label or weight.
        rows: what hooks may know beside.
    """

    labels: Any
    logits: Any
    weights: jax.Array
    bad: jax.Array
    rows: Rows

    @property
    def counted(self) -> jax.Array:
        """The weights that metrics count with: bad elements are left out."""
        return masking.choose(self.bad, jnp.zeros_like(self.weights), self.weights)

    def of_whole_rows(self) -> "Elements":
        """The same with one weight a row, for losses of one value a row where entries have masks or weights.

        It is the mean weight of the entries that exist, so that a row counts once, however many of them there are.
        """
        if self.weights.shape[-1] == 1 and self.rows.exists.shape[-1] == 1:
            return self
        exists = jnp.broadcast_to(self.rows.exists, jnp.broadcast_shapes(self.rows.exists.shape, self.weights.shape))
        row = jnp.any(exists, -1, keepdims=True)
        weights = mean_of_entries(self.weights, exists)
        rows = dataclasses.replace(self.rows, exists=row)
        return self._replace(weights=weights, bad=jnp.any(self.bad, -1, keepdims=True), rows=rows)


def mean_of_entries(weights: jax.Array, exists: jax.Array) -> jax.Array:
    """The mean weight `[..., 1]` of the entries of a row that exist."""
    there = jnp.broadcast_to(exists, weights.shape).astype(jnp.float32) * masking.ones_like(weights)
    n = jnp.sum(there, -1, keepdims=True)
    return jnp.sum(weights * there, -1, keepdims=True) / jnp.maximum(n, jnp.ones_like(n))

"""Slices and bootstrap replicas: every metric again, for each group of the data and for each resampling of it.

Each observation is reduced once for all data and once more for each group, under weights that are 0 outside it. So a
head needs to know nothing of groups; metrics are read from an array with a leading axis.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.metrics.base import Observation
from jaxheads.numerics import brief, columns, inputs, masking, meshes


@dataclasses.dataclass(frozen=True)
class Slices:
    """Groups of the data. Each gets every metric: `jh.BinaryClassHead(slices=jh.Slices("origin", 3))`.

    The ids are a column of `features`: integers `[...]` or `[..., 1]` from 0 to n - 1, and -1 for no group. Eager calls
    also take the `names`, and None for no group. Where groups overlap, the column is a membership matrix `[..., n]` of
    bool or 0/1 (of one column: bool). A column with fewer leading axes than labels holds for all elements inside; one
    with as many axes holds ids. `metrics.by_slice()` reads them.

    Args:
        column: a key of `features`, or a function `features -> ids`.
        n: the number of groups.
        names: the names of the groups; by default their numbers.
        min_count: a group with fewer elements that weigh anything has no metrics: they are undefined.

    Raises:
        ValueError: n below 1, names of another number, a negative `min_count`.
    """

    column: str | Callable[[Any], Any]
    n: int
    _: dataclasses.KW_ONLY
    names: Sequence[str] | None = None
    min_count: int = 1

    def __post_init__(self):
        if not (isinstance(self.column, str) or callable(self.column)):
            raise ValueError(f"Slices: column must be a key of features or a function of them. Given {self.column!r}.")
        for name, value, least in (("n", self.n, 1), ("min_count", self.min_count, 0)):
            if not inputs.is_integer(value, least):
                raise ValueError(f"Slices: {name} must be an integer of at least {least}. Given {value!r}.")
            object.__setattr__(self, name, int(value))
        if self.names is not None:
            names = brief.as_names(self.names)
            if names is None or not len(set(names)) == len(names) == self.n:
                raise ValueError(
                    f"Slices: names must be {self.n} strings, all different. Given {brief.tell(self.names)}."
                )
            object.__setattr__(self, "names", names)

    def ids(self, features: Any, lead: tuple[int, ...], live: Any, check: bool | None) -> Any:
        """Returns a batch's ids int32 `lead + [1]`, or membership matrix `lead + [n]`; live rows are checked."""
        column = self.column
        found = columns.column(features, column, "of slices") if isinstance(column, str) else column(features)
        ids = inputs.as_slices(self._number(found, live), lead, self.n)
        inputs.check_slices(ids, self.n, live, check)
        return ids

    def _number(self, column: Any, live: Any) -> Any:
        """Returns ids for names of the groups, on the host; all else unchanged. A missing name is -1, no group."""
        array = column if isinstance(column, jax.Array) else np.asarray(column)
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "USTO":
            return column
        if self.names is None:
            raise ValueError(
                f"slices are integers from 0 to {self.n - 1}, and -1 for no group. Given dtype {array.dtype}. To give "
                'names, build the head with them: jh.Slices("origin", 2, names=("JFK", "LGA")).'
            )
        number = {name: i for i, name in enumerate(self.names)}
        values = [x.decode() if isinstance(x, bytes) else x for x in array.ravel().tolist()]
        there = np.ones(array.size, bool) if live is None or live.size != array.size else live.ravel()
        values = [None if x is None or x != x or type(x).__name__ == "NAType" else x for x in values]
        known = {**number, **{i: i for i in range(-1, self.n)}, None: -1}
        unknown = [x for x, seen in zip(values, there, strict=True) if seen and x not in known]
        if unknown:
            raise ValueError(
                f"slices must be among {list(self.names)[:10]}. Given {unknown[0]!r}, {len(unknown)} unknown in all. "
                "Add it to names, or give None for no group."
            )
        return np.asarray([known.get(x, -1) for x in values], np.int32).reshape(array.shape)

    def __repr__(self) -> str:
        parts = [repr(self.column), repr(self.n)]
        parts += [f"names={self.names!r}"] if self.names is not None else []
        parts += [f"min_count={self.min_count}"] if self.min_count != 1 else []
        return f"Slices({', '.join(parts)})"


@dataclasses.dataclass(frozen=True)
class Bootstrap:
    """Replicas of every metric under random weights: `jh.BinaryClassHead(bootstrap=jh.Bootstrap(200))`.

    Each replica counts each element as often as a Poisson variable of mean 1 says. Of many elements, the bootstrap
    draws each so often (Hanley and MacGibbon 2006; Chamandy et al. 2012). The draws come from the `key=` that every
    update is given, a new one for every batch. `metrics.compute(confidence=0.95)` reads them, and `a.compare(b)` reads
    the differences of two models that were given the same keys.

    Large batches on a CPU are drawn tile by tile. Sums that are made once for all tiles (a confusion matrix of many
    classes) have draws of their own: intervals are right for each metric, not for differences of two within a replica.

    Args:
        replicas: the number of replicas, and the factor by which an update costs more. The state of all replicas is
            written at every update, so batches should be large: thousands of rows.

    Raises:
        ValueError: fewer than 2 replicas.
    """

    replicas: int = 200

    def __post_init__(self):
        if not inputs.is_integer(self.replicas, 2):
            raise ValueError(f"Bootstrap: replicas must be an integer of at least 2. Given {self.replicas!r}.")
        object.__setattr__(self, "replicas", int(self.replicas))


@dataclasses.dataclass(frozen=True)
class Grouped(Observation):
    """An observation that is reduced again for every group and replica: `[1 + replicas, 1 + groups, size]`.

    The first entry of each axis is for all data.
    """

    inner: Observation
    replicas: int = 0
    groups: int = 0

    @property
    def entries(self) -> tuple[int, int]:
        """The numbers of replicas and of groups, all data included."""
        return 1 + self.replicas, 1 + self.groups

    @property
    def is_late(self) -> bool:
        """The `is_late` of the inner observation."""
        return self.inner.is_late

    @property
    def size(self) -> int:
        """The inner size, for each replica and group."""
        return (1 + self.replicas) * (1 + self.groups) * self.inner.size

    def reduce(self, weights: jax.Array) -> jax.Array:
        """Raises an error: the head reduces the inner observation."""
        raise NotImplementedError("a Grouped describes a stretch of the state; the head reduces what is inside")

    def read(self, sums: Any, xp: Any, undefined: float) -> Any:
        """Returns a view of all data."""
        return self.inner.read(self.pick(sums[..., None], (0, 0))[..., 0], xp, undefined)

    def pick(self, pairs: Any, at: Any) -> Any:
        """Returns the pairs `[..., size, 1 or 2]` of one entry, or of several, with a leading axis.

        `at` indexes replicas and groups.
        """
        apart = pairs.reshape((*pairs.shape[:-2], *self.entries, self.inner.size, pairs.shape[-1]))
        return apart[(..., *at, slice(None), slice(None))]


@dataclasses.dataclass(frozen=True)
class Count(Observation):
    """The number of elements that weigh anything: `[..., 1]` of any value."""

    elements: Any

    @property
    def size(self) -> int:
        """One number."""
        return 1

    def reduce(self, weights: jax.Array) -> jax.Array:
        """Returns the number in this batch."""
        return masking.total(jnp.any(jnp.asarray(weights) != 0, -1, keepdims=True))[None]

    def read(self, sums: Any, xp: Any, undefined: float) -> Any:
        """Returns the number."""
        return sums[..., 0]


jax.tree_util.register_dataclass(Count, ["elements"], [])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Membership:
    """The groups of each row.

    Attributes:
        n: the number of groups.
        ids: int32 `[..., 1]`, -1 for none; None where groups overlap.
        matrix: bool `[..., n]` where they do.
    """

    n: int = dataclasses.field(metadata={"static": True})
    ids: Any = None
    matrix: Any = None

    @classmethod
    def of(cls, given: jax.Array, n: int) -> "tuple[Membership, jax.Array]":
        """Returns the membership that `Slices.ids` tells, and the rows, `[..., 1]`, whose group does not exist."""
        if given.dtype == jnp.bool_ or given.shape[-1] != 1:
            inside = given.astype(jnp.int32)
            return cls(n, None, inside == 1), jnp.any((inside != 0) & (inside != 1), -1, keepdims=True)
        if given.dtype.itemsize < 4:
            given = given.astype(jnp.int32)
        if jnp.issubdtype(given.dtype, jnp.unsignedinteger):
            ids = jnp.minimum(given, jnp.asarray(n, given.dtype)).astype(jnp.int32)
        else:
            ids = jnp.clip(given, -2, n).astype(jnp.int32)
        stray = (ids < -1) | (ids >= n)
        return cls(n, jnp.where(stray, np.int32(-1), ids)), stray

    @property
    def indicators(self) -> jax.Array:
        """1 inside and 0 outside of each group: `[..., n]`."""
        if self.ids is None:
            return self.matrix.astype(jnp.float32)
        groups = jnp.expand_dims(jnp.arange(self.n, dtype=jnp.int32), tuple(range(self.ids.ndim - 1)))
        return (self.ids == groups).astype(jnp.float32)

    def each(self, reduce: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """Returns `reduce` of each group's weights, 1 inside and 0 outside, one after the other."""
        # On a mesh a loop would be an all-reduce for each.
        return (
            self.at_once(reduce) if not meshes.is_local(self) else jax.lax.map(self._weigh(reduce), self._list_groups())
        )

    def at_once(self, reduce: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """Returns the same for all groups at once."""
        return jax.vmap(self._weigh(reduce))(self._list_groups())

    def _list_groups(self) -> jax.Array:
        return jnp.arange(self.n, dtype=jnp.int32) if self.ids is not None else jnp.moveaxis(self.matrix, -1, 0)

    def _weigh(self, reduce: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
        def of_group(group: jax.Array) -> jax.Array:
            inside = self.ids == group if self.ids is not None else group[..., None]
            return reduce(inside.astype(jnp.float32))

        return of_group


def reduced(observation: Observation, weights: jax.Array, groups: Any, replicas: Any) -> jax.Array:
    """Returns the sums of an observation for all data, each group and each replica: `[(1 + r) (1 + g) size]`.

    Args:
        groups: a `Membership`; None without groups.
        replicas: keys `[r]`; None without replicas.
    """

    def entry(weights: jax.Array) -> jax.Array:
        whole = observation.reduce(weights)[None]
        return whole if groups is None else jnp.concatenate([whole, observation.reduce_by(weights, groups)])

    if replicas is None:
        whole = observation.reduce(weights) if groups is None else entry(weights)
        return whole if whole.ndim == 1 else whole.ravel()

    def replica(key: jax.Array) -> jax.Array:
        return entry(weights * poisson(key, weights))

    over = jax.lax.map if meshes.is_local(weights) else (lambda f, keys: jax.vmap(f)(keys))
    return jnp.concatenate([entry(weights)[None], over(replica, replicas)]).ravel()


def poisson(key: jax.Array, weights: jax.Array) -> jax.Array:
    """Draws how often a replica counts each row: Poisson numbers of mean 1, `[..., 1]`.

    It inverts one uniform number, in one pass. One row in 1e8 should count more than 10 times, and counts 10 times.
    """
    u = jax.random.uniform(key, (*weights.shape[:-1], 1), jnp.float32)
    below = np.cumsum(np.exp(-1.0) / np.cumprod([1.0, *range(1, 12)]))
    counts = [(u >= np.float32(p)).astype(jnp.float32) for p in below]
    return sum(counts[1:], counts[0])

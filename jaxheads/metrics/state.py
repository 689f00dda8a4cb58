"""`Metrics`: one pytree a head, whose arrays add."""

import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxheads.metrics.base import (
    AVERAGE_LOSS,
    CONFUSION,
    COUNT,
    REGULARIZATION_LOSS,
    SCORES,
    SLICE,
    SLICE_SIZE,
    Observation,
    Path,
    View,
    calibration_key,
    join_names,
)
from jaxheads.metrics.curves import Interval, ScoresView
from jaxheads.metrics.groups import Bootstrap, Grouped, Slices
from jaxheads.metrics.outcomes import Normalize, check_normalize
from jaxheads.metrics.reading import (
    STAMP,
    add_quantiles,
    check_stamp,
    find_middle,
    float32,
    hide_small,
    name_values,
    on_host,
    slots,
)
from jaxheads.numerics import brief, inputs, meshes, pairs
from jaxheads.numerics.kept import per_head, twin_of
from jaxheads.numerics.reduction import SMALLEST_SUM
from jaxheads.numerics.warned import BadInputWarning, GridWarning, StackedWarning

if TYPE_CHECKING:
    from jaxheads.metrics.comparing import Comparison


@runtime_checkable
class Reader(Protocol):
    """The part of a head that its state reads."""

    @property
    def suffix(self) -> str | None: ...

    @property
    def slices(self) -> Slices | None: ...

    @property
    def bootstrap(self) -> Bootstrap | None: ...

    def observed(self) -> Mapping[Path, Observation]: ...

    def read(self, seen: Mapping[Path, Any]) -> Mapping[tuple[str, str | None], Any]: ...


# An empty state of more sums than this is read without values: tracing takes time for each name, but no memory.
LARGE = 2**22

ResultT = TypeVar("ResultT")


def _find_names(head: Any, path: Path) -> tuple[str, ...] | None:
    """Returns the names of the classes of the head inside that keeps an observation."""
    for name in path:
        while "" in (inner := head.parts()):
            head = inner[""]
        head = inner.get(name, head)
    return head.class_names()


def read_nothing(head: Any, read: Callable[[dict[Path, Any]], ResultT]) -> ResultT:
    """Returns `read(views)` of an empty state, for questions without data: the names and the shapes of metrics."""
    size, found = slots(head, False)[1], []

    def run(state: Any) -> None:
        found.append(read(Metrics(state, head)._read_views(np.nan)[0]))

    if size > LARGE:
        jax.eval_shape(run, jax.ShapeDtypeStruct((size, 1), jnp.float32))
    else:
        with np.errstate(all="ignore"):
            run(np.zeros((size, 1), np.float32))
    return found[0]


@per_head
def metric_names(head: Any) -> tuple[str, ...]:
    """Returns the full names of a head's metrics."""
    return read_nothing(head, lambda views: tuple(join_names(*key) for key in head.read(views)))


_add = jax.jit(pairs.add)
_sum = jax.jit(pairs.add_along, static_argnums=1)

# A state of fewer numbers is pickled as it is.
SMALL = 1024


def _unpack(shape: tuple[int, ...], places: np.ndarray, bits: np.ndarray, head: Any, regularized: bool) -> "Metrics":
    """Makes metrics of the content of a pickle: which numbers are not 0, and their bits."""
    size = int(np.prod(shape))
    state = np.zeros(size, np.uint32)
    state[np.unpackbits(places, count=size).astype(bool)] = bits
    return Metrics(state.view(np.float32).reshape(shape), twin_of(head), regularized)


# A warning tells of bins that leave a metric open, for slices of at least so many elements.
_MANY = 100


def _as_index(x: Any) -> Any:
    """Returns an index along one axis: a slice, an integer, or an array of integers; None for all other values."""
    if isinstance(x, slice):
        return x
    x = np.asarray(x) if isinstance(x, list) and x else x
    if isinstance(x, (int, np.integer, np.ndarray, jax.Array)) and not isinstance(x, bool):
        if not isinstance(x, int) and x.dtype.kind not in "iu":
            return None
        return int(x) if jnp.ndim(x) == 0 and not isinstance(x, Tracer) else x
    return None


def _check_undefined(undefined: Any) -> None:
    is_number = isinstance(undefined, (int, float, np.number)) or (
        isinstance(undefined, (np.ndarray, jax.Array)) and undefined.shape == ()
    )
    if not is_number:
        raise ValueError(f"undefined must be a number, NaN by default. Given {brief.tell(undefined)}.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Metrics:
    """The metric state of a head: additive arrays, packed in one.

    `a + b` merges. The trailing axis of `state` is a compensated pair, or of size 1 for the plain float32 sums of a
    single batch (`head.measure`). Any leading axis (devices, steps) passes through `+`, `psum` and `compute`;
    `metrics[i]` takes one state of such a stack, and `metrics.sum()` adds them up.

    Attributes:
        state: float32 `[..., slots, 1 or 2]`, a plain array to a checkpoint.
        head: the unbound head that says what the slots mean.
        regularized: whether a regularization loss is kept.

    >>> import jax.numpy as jnp
    >>> import jaxheads as jh
    >>> head = jh.RegressionHead()
    >>> zero = head.metrics()
    >>> first = head.measure(labels=jnp.array([1.0, 2.0]), logits=jnp.array([[1.0], [4.0]]))
    >>> second = head.measure(labels=jnp.array([3.0]), logits=jnp.array([[3.0]]))
    >>> (zero + first + second).compute()["label/mean"]
    2.0
    """

    state: Any
    head: Any = dataclasses.field(metadata={"static": True})
    regularized: bool = dataclasses.field(default=False, metadata={"static": True})

    def __add__(self, other: "Metrics") -> "Metrics":
        """Returns the metrics of both sets of data."""
        if not isinstance(other, Metrics):
            return NotImplemented
        self.check_same_kind(other)
        for each in (self, other):
            each.check_size()
            each.check_stamp()
        a, b = jnp.shape(self.state)[:-2], jnp.shape(other.state)[:-2]
        if a and b and a != b:
            raise ValueError(
                f"Metrics add if their leading axes are equal, or one of them has none. Given leading axes {a} and {b} "
                f"of {self.head!r}."
            )
        return dataclasses.replace(self, state=_add(self.state, other.state))

    def __radd__(self, other: Any) -> "Metrics":
        # sum(list_of_metrics) starts from the integer 0.
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __getitem__(self, index: Any) -> "Metrics":
        """Returns one state of several in one, or a stretch of them: `metrics[0]`, `metrics[-10:]`, `metrics[0, 3]`.

        `jax.pmap`, `jax.vmap` and the outputs of `jax.lax.scan` stack states. The axes are those of the stack.
        `metrics[None]` makes a stack of one: `shard_map` wants the axis back that `metrics[0]` has taken.

        Raises:
            ValueError: another index, an index out of range, one state alone.

        >>> import jax, numpy as np
        >>> import jaxheads as jh
        >>> head = jh.RegressionHead()
        >>> labels, logits = np.array([[1.0], [3.0]], np.float32), np.zeros((2, 1, 1), np.float32)
        >>> stacked = jax.vmap(head.measure)(labels, logits)
        >>> len(stacked), [one.compute()["average_loss"] for one in stacked], stacked.sum().compute()["average_loss"]
        (2, [1.0, 9.0], 5.0)
        """
        lead, given = jnp.shape(self.state)[:-2], index if isinstance(index, tuple) else (index,)
        if index is None:
            return dataclasses.replace(self, state=self.state[None])
        chosen = tuple(_as_index(x) for x in given)
        if any(x is None for x in chosen) or len(chosen) > len(lead):
            raise ValueError(
                "metrics[i] takes one of several states in one, or some of them, by integers, arrays of integers or "
                f"slices. Given [{brief.tell(index)}] of "
                + (f"states {lead}." if lead else 'one state. Its values are in metrics.compute(): compute()["auc"].')
            )
        for x, n in zip(chosen, lead, strict=False):
            if not isinstance(x, (slice, Tracer)) and ((np.asarray(x) < -n) | (np.asarray(x) >= n)).any():
                raise ValueError(f"metrics[{brief.tell(index)}] is not there: these are several states in one, {lead}.")
        return dataclasses.replace(self, state=self._whole()[chosen])

    def __len__(self) -> int:
        """Returns the number of states along the first axis of several in one."""
        if not (lead := jnp.shape(self.state)[:-2]):
            raise TypeError("One state of metrics has no length, and is not iterable. Its values: metrics.compute().")
        return lead[0]

    def __iter__(self) -> "Iterator[Metrics]":
        """Gives the states along the first axis of several in one."""
        return map(self.__getitem__, range(len(self)))

    def __bool__(self) -> bool:
        """Returns True: a state is a value, however many states are in it."""
        return True

    def sum(self, axis: int | None = None) -> "Metrics":
        """Returns the metrics of all data of several states in one, or their sums along one axis of the stack.

        It is for states that `jax.pmap`, `jax.vmap` or `jax.lax.scan` stacked. States that the step merged already,
        with `.psum(axis_name)`, are all equal: take one of them, `metrics[0]`. Inside a step, `.psum` merges devices.

        Args:
            axis: an axis of the stack; None for all of them.

        Raises:
            ValueError: the stack has no such axis.
        """
        lead = jnp.shape(self.state)[:-2]
        if axis is not None and not (lead and inputs.is_integer(axis, -len(lead), len(lead) - 1)):
            raise ValueError(
                f"sum(axis=) takes an axis of several states in one, or None for all. Given axis={brief.tell(axis)} of "
                + (f"states {lead}." if lead else "one state.")
            )
        axes = tuple(range(len(lead))) if axis is None else (int(axis) % len(lead),)
        if not axes:
            return self
        self.check_stamp()
        state = self._whole()
        if isinstance(state, np.ndarray):
            state = np.moveaxis(state, axes, range(len(axes))).reshape(-1, *np.delete(state.shape, axes))
            with np.errstate(over="ignore", invalid="ignore"):
                return dataclasses.replace(self, state=pairs.merge([np.zeros_like(state[:0].sum(0)), *state]))
        return dataclasses.replace(self, state=_sum(state, axes))

    def _whole(self) -> Any:
        """Returns the state, with all its states on every device: no axis of a mesh cuts the stack."""
        return self.state if isinstance(self.state, np.ndarray) else meshes.replicated(self.state)

    @classmethod
    def merge(cls, states: "Iterable[Metrics]", head: Any = None) -> "Metrics":
        """Returns the metrics of all states, added on the host in float64: no device is needed, nor is one touched.

        For the combiners of Beam, Ray or Spark, and for states that processes computed on their own: a pickled state is
        a NumPy array, and so is the result.

        Args:
            states: of equal leading axes; at least one, unless a head is given.
            head: the head of the states. An empty list then gives its zero metrics: a combiner has an identity.

        Raises:
            ValueError: no states, states of different heads or shapes.

        >>> import jax, numpy as np
        >>> import jaxheads as jh
        >>> head = jh.RegressionHead()
        >>> parts = [head.measure(labels=np.array([y]), logits=np.array([[0.0]], np.float32)) for y in (1.0, 2.0)]
        >>> jh.Metrics.merge(parts).compute()["average_loss"]  # (1 + 4) / 2
        2.5
        """
        if isinstance(states, Metrics):
            raise ValueError("merge() takes several states. Given one Metrics alone; of one, pass a list, [metrics].")
        if not isinstance(states, Iterable) or isinstance(states, (np.ndarray, jax.Array)):
            raise ValueError(f"merge() takes a list of states. Given {brief.tell(states)}.")
        states = list(states)
        if head is not None:
            if not isinstance(head, Reader):
                raise ValueError(f"head must be a head, such as jh.BinaryClassHead(). Given {brief.tell(head)}.")
            states = states or [cls(np.zeros((slots(head, False)[1], 2), np.float32), twin_of(head))]
        if not states or not all(isinstance(state, Metrics) for state in states):
            kinds = sorted({type(state).__name__ for state in states})
            raise ValueError(
                f"merge() needs at least one Metrics, and nothing else. Given {kinds or 'nothing'}. With head=, an "
                "empty list gives zero metrics."
            )
        if head is not None and len({state.regularized for state in states}) > 1:
            # An empty state keeps no regularization, and adds nothing to one that does.
            states = [state for state in states if state.regularized or np.any(on_host(state.state))]
        first = states[0] if head is None else Metrics(None, twin_of(head), states[0].regularized)
        for state in states:
            first.check_same_kind(state)
            state.check_size()
            state.check_stamp()
        leads = {np.shape(state.state)[:-2] for state in states}
        if len(leads) > 1:
            raise ValueError(f"merge() adds states of equal leading axes. Given {sorted(leads)} of {first.head!r}.")
        if any(isinstance(state.state, Tracer) for state in states):
            raise ValueError("merge() works on the host, outside jit. There, metrics add: a + b.")
        # As on a device, an overflow is inf and inf - inf is NaN, without a warning.
        with np.errstate(over="ignore", invalid="ignore"):
            return dataclasses.replace(first, state=pairs.merge([on_host(state.state) for state in states]))

    def __reduce__(self) -> Any:
        # Where it is unpickled there may be no device. In a state with many slices or bins, most sums are 0.
        state = np.asarray(on_host(self.state)) if isinstance(self.state, jax.Array) else self.state
        if isinstance(state, np.ndarray) and state.dtype == np.float32 and state.size > SMALL:
            bits = np.ascontiguousarray(state).view(np.uint32).ravel()
            if np.count_nonzero(bits) < state.size / 2:
                packed = state.shape, np.packbits(bits != 0), bits[bits != 0]
                return _unpack, (*packed, self.head, self.regularized)
        return type(self), (state, self.head, self.regularized)

    def __deepcopy__(self, memo: Any) -> "Metrics":
        return dataclasses.replace(self, state=copy.deepcopy(self.state, memo))

    def __copy__(self) -> "Metrics":
        return dataclasses.replace(self)

    def check_same_kind(self, other: "Metrics") -> None:
        """Refuses a state that does not add to this one, saying why."""
        if self.head != other.head:
            one, another = repr(self.head), repr(other.head)
            alike = one == another
            raise ValueError(
                f"Metrics of different heads do not add.\n  One is of {one},\n  the other of {another}.\n"
                + ("Their reprs are equal: they hold two functions or classes of the same name. " if alike else "")
                + "Build the head once (in a notebook: in a cell of its own) and use it for every batch."
            )
        if self.regularized != other.regularized:
            has, lacks = ("left", "right") if self.regularized else ("right", "left")
            raise ValueError(
                f"The {has} metrics keep a regularization loss, the {lacks} ones do not. Pass regularization_losses "
                "to head.metrics() and to every update or measure, or to none ([] counts as 0)."
            )

    def check_one_state(self) -> None:
        """Refuses a state to which `update_metrics` cannot add one batch: of another head, or several states in one."""
        self.check_size()
        if lead := jnp.shape(self.state)[:-2]:
            raise ValueError(
                f"update_metrics adds one batch to one state. Given a state with leading axes {lead}: the batch would "
                "count once for each of its entries. Call it inside the pmap or vmap that made them; inside shard_map, "
                "where an axis of size 1 is left, take metrics[0], and metrics[None] at the end; or merge them "
                "there, with .psum(axis_name)."
            )

    def check_size(self) -> None:
        """Refuses a state of another number of slots than the head keeps: a checkpoint of another configuration."""
        given, expected = jnp.shape(self.state), slots(self.head, self.regularized)[1]
        if len(given) < 2 or given[-2] != expected or given[-1] not in (1, 2):
            raise ValueError(
                f"This state does not fit its head. Given shape {given}, expected [..., {expected}, 1 or 2] for "
                f"{self.head!r}{' with regularization' if self.regularized else ''}. Was it saved by a head of other "
                "bins, thresholds or metrics?"
            )

    def check_stamp(self) -> None:
        """Refuses a state on the host whose slots mean something else. One on a device is checked when it is read."""
        if isinstance(self.state, np.ndarray):
            check_stamp(self.head, np.asarray(self.state[..., 1 : 1 + STAMP, :], np.float64).sum(-1))

    def psum(self, axis_name: Any) -> "Metrics":
        """Returns the merged metrics of all devices along `axis_name`, the same on each, in one all-reduce."""
        return dataclasses.replace(self, state=pairs.psum(self.state, axis_name))

    def varying(self, axis_name: Any) -> "Metrics":
        """Returns the same values, typed as differing over `axis_name`: the first carry of a scan in `shard_map`."""
        meshes.check_axis(axis_name)
        return dataclasses.replace(self, state=jax.lax.pcast(self.state, axis_name, to="varying"))

    def _read_views(self, undefined: float, at: Any = (0, 0)) -> tuple[dict[Path, Any], Any, Any, Any]:
        """Returns views by path, of replicas and groups `at`; the bad count; the regularization; the array module."""
        self.check_size()
        if isinstance(self.state, Tracer):
            xp, state, add = jnp, jnp.sum(self.state, -1, keepdims=True), lambda part: part[..., 0]
        else:
            # In float64 on the host: exact, one transfer, and nothing to compile. Replicas and slices that are not
            # asked for are not converted: a state may hold thousands.
            xp, state, add = np, np.asarray(on_host(self.state)), lambda part: np.asarray(part, np.float64).sum(-1)
        layout, _ = slots(self.head, self.regularized)

        def view(start: int, observation: Observation) -> Any:
            part = state[..., start : start + observation.size, :]
            if isinstance(observation, Grouped):
                part, observation = observation.pick(part, at), observation.inner
            return observation.read(add(part), xp, undefined)

        start = 1 + STAMP
        if xp is np:
            check_stamp(self.head, add(state[..., 1:start, :]))
        views = {path: view(start, observation) for path, (start, observation) in layout.items()}
        return views, add(state[..., 0, :]), add(state[..., start : start + 2, :]) if self.regularized else None, xp

    def compute(
        self,
        undefined: float = np.nan,
        bounds: bool = False,
        confidence: float | None = None,
        *,
        warn: bool = True,
    ) -> dict[str, Any]:
        """Returns the metrics by name, as float32 scalars (arrays, if the state has a leading axis).

        Args:
            undefined: the value of a metric whose denominator is zero; 0.0 is TensorFlow's convention.
            bounds: also give `auc/lower`, `auc/upper` and their like: the interval that holds the value of the same
                scores without bins.
            confidence: also give `auc/ci_lower`, `auc/ci_upper`, of every metric: the middle `confidence` of the
                bootstrap replicas (the percentile interval). The head needs `bootstrap=jh.Bootstrap(200)`.
            warn: False gives no warnings, for values that are known to be preliminary.

        Warns:
            BadInputWarning: outside `jit`, if elements with an illegal label, weight or slice were left out, or if all
                weights together are below 2^-120, about 7.5e-37.
            StackedWarning: outside `jit`, if the state has a leading axis (of devices): then each value is an array.
            GridWarning: outside `jit`, if the bins leave more than 1e-2 of a metric open; it tells the `bins` to use.
                Bins cannot tell close scores from equal ones, so it warns of scores that are all equal too.
        """
        _check_undefined(undefined)
        inputs.check_switch("bounds", bounds)
        inputs.check_switch("warn", warn)
        with jax.debug_nans(False), np.errstate(all="ignore"):
            values, bad, xp = self._read_values(undefined)
        if warn:
            self._warn_of_input(bad, xp)
            self._warn_of_bins(values if xp is np else {})
        if warn and xp is np and self._lead:
            warnings.warn(
                f"These metrics are several states in one, {np.shape(self.state)[:-2]}, and each value is an array of "
                "as many. For the metrics of all data merge them: with .psum(axis_name) inside the step, or by "
                "metrics.sum(). metrics[0] is one of them, and enough if the step has merged them already.",
                StackedWarning,
                stacklevel=2,
            )
        out = name_values(values, bounds, xp)
        if confidence is not None:
            self._check_confidence(confidence)
            with jax.debug_nans(False), np.errstate(all="ignore"):
                replicas = self._read_replicas(undefined, (slice(1, None), 0))
                measured = values if np.isnan(undefined) else self._read_values(np.nan)[0]
            add_quantiles(out, replicas, measured, confidence, undefined, xp, self._lead)
        return out

    def by_slice(
        self, undefined: float = np.nan, bounds: bool = False, confidence: float | None = None
    ) -> dict[str, Any]:
        """Returns the metrics of each slice: arrays `[n]` by name, with `slice` (the names) and `count` first.

        They fit `pandas.DataFrame(metrics.by_slice())`. A metric that is an array itself, such as a confusion matrix,
        is a list of n arrays; inside `jit` it is `[n, classes, classes]`, and there are no names. Where fewer than
        `min_count` elements weigh anything, a slice has no metrics: they are undefined.

        Args:
            undefined, bounds, confidence: as for `compute`.

        Warns:
            BadInputWarning, GridWarning: outside `jit`, as `compute`; GridWarning also for a slice of at least 100
                elements.

        >>> import numpy as np
        >>> import jaxheads as jh
        >>> head = jh.RegressionHead(slices=jh.Slices("origin", 2, names=("JFK", "LGA")))
        >>> features, logits = {"origin": np.array([0, 1, 1])}, np.zeros((3, 1), np.float32)
        >>> found = head.measure(labels=[1.0, 2.0, 4.0], logits=logits, features=features).by_slice()
        >>> found["slice"].tolist(), found["count"].tolist(), found["label/mean"].tolist()
        (['JFK', 'LGA'], [1.0, 2.0], [1.0, 3.0])
        """
        slices = self._require_slices("by_slice()")
        _check_undefined(undefined)
        inputs.check_switch("bounds", bounds)
        with jax.debug_nans(False), np.errstate(all="ignore"):
            values, bad, xp = self._read_values(undefined, (0, slice(1, None)))
            counts = self._count_elements((0, slice(1, None)))

            def too_small(name: str | None, least: int = slices.min_count) -> Any:
                # In a MultiHead each head has seen rows of its own; elsewhere there is one count.
                return counts[name if name in counts else None] < least

            shown = {key: hide_small(x, too_small(key[1]), undefined, xp) for key, x in values.items()}
            out = name_values(shown, bounds, xp)
            if confidence is not None:
                self._check_confidence(confidence)
                replicas = self._read_replicas(undefined, (slice(1, None), slice(1, None)))
                measured = values if np.isnan(undefined) else self._read_values(np.nan, (0, slice(1, None)))[0]
                measured = {key: hide_small(x, too_small(key[1]), np.nan, xp) for key, x in measured.items()}
                add_quantiles(out, replicas, measured, confidence, undefined, xp, self._lead)
        self._warn_of_input(bad, xp)
        if xp is np:
            with np.errstate(all="ignore"):
                large = {key: hide_small(x, too_small(key[1], _MANY), np.nan, xp) for key, x in shown.items()}
                whole, _, _ = self._read_values(np.nan)
            self._warn_of_bins(whole, large)
        names = {} if xp is jnp else {SLICE: np.asarray(slices.names or tuple(range(slices.n)))}
        sizes = {join_names(SLICE_SIZE, name): float32(count, xp) for name, count in counts.items()}
        if xp is np and not self._lead:
            # A column of a data frame holds objects, not arrays of three axes.
            out = {key: list(value) if value.ndim > 1 else value for key, value in out.items()}
        return {**names, **sizes, **out}

    def compare(self, other: "Metrics", confidence: float = 0.95, undefined: float = np.nan) -> "Comparison":
        """Returns the differences to the metrics of another model, this one's less the other's, with their intervals.

        Both models need metrics of the same rows, with replicas of the same draws: the same batches in the same order,
        and the same `key=` for each. Then every replica has a difference of its own. Its spread is smaller than that
        of two models on rows of their own, because easy rows are easy for both.

        The heads are of one kind, with the same labels, classes, slices, replicas and names of metrics; else they may
        differ, in their bins for example. `average_loss` is that of each head: it compares only equal losses. Metrics
        that are arrays, such as a confusion matrix, are left out. So is `regularization_loss`, which has no replicas.

        Args:
            other: the metrics of the other model.
            confidence: the share of replicas inside of an interval.
            undefined: counts for a class without a value in a mean over classes, as in `compute`.

        Returns:
            A `jh.metrics.Comparison`, for all data and for each slice: a dict of the columns `metric`, `slice`, `a`,
            `b`, `difference`, `ci_lower`, `ci_upper`, `share_above_zero`. `pandas.DataFrame` takes it.

        Warns:
            BadInputWarning, GridWarning: as `compute`, for either model.

        Raises:
            ValueError: inside `jit`; no replicas; heads that do not compare; other rows, or replicas of other draws, as
                far as sums of weights, means of labels, positives of histograms and counts of classes tell. A
                `MultiClassHead` keeps counts with a metric of classes alone, such as `BalancedAccuracy`.

        Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13.

        >>> import jax, numpy as np
        >>> import jaxheads as jh
        >>> head = jh.RegressionHead(bootstrap=jh.Bootstrap(100))
        >>> labels, noise = np.random.default_rng(0).normal(size=(2, 500, 1)).astype(np.float32)
        >>> one, two = (head.measure(labels, labels + c * noise, key=jax.random.key(1)) for c in (0.5, 0.6))
        >>> found = one.compare(two).find("average_loss")
        >>> print(f"{found['difference']:.3f}", found["ci_upper"] < 0, found["share_above_zero"])
        -0.097 True 0.0
        """
        from jaxheads.metrics import comparing

        if not isinstance(other, Metrics):
            raise ValueError(f"compare() takes the Metrics of another model. Given {brief.tell(other)}.")
        _check_undefined(undefined)
        for each in (self, other):
            each._check_concrete("compare()")
            each._check_confidence(confidence, "compare()")
        comparing.check_comparable(self.head, other.head)
        every = slice(None), slice(None)
        with np.errstate(all="ignore"):
            left, right = self._read_replicas(undefined, every), other._read_replicas(undefined, every)
            comparing.check_same_names(left, right)
            comparing.check_same_rows(self._weigh_losses(every), other._weigh_losses(every))
            comparing.check_same_labels(left, right)
            comparing.check_same_positives(self._weigh_labels(every), other._weigh_labels(every))
            slices = self.head.slices
            names = None if slices is None else list(slices.names or range(slices.n))
            least = 0 if slices is None else slices.min_count
            counts = self._count_elements((0, slice(1, None))) if slices else {}
            small = {name: count < least for name, count in counts.items()}
            out = comparing.compare(left, right, small, names, confidence, self.head.bootstrap.replicas)
        for each in (self, other):
            with np.errstate(all="ignore"):
                values, bad, xp = each._read_values(np.nan)
            each._warn_of_input(bad, xp)
            each._warn_of_bins(values)
        return out

    def _weigh_labels(self, at: Any) -> dict[Any, Any]:
        """Returns the weights of positives, and of the labels of each class, where histograms or counts tell them."""
        from jaxheads.metrics.confusion import ClassesView

        found: dict[Any, Any] = {}
        for path, view in self._read_views(np.nan, at)[0].items():
            if isinstance(view, ScoresView):
                found[path] = view.positives
                found |= {(path, column): each.positives for column, each in view.columns.items()}
            elif isinstance(view, ClassesView):
                found |= {(path, k): view.support[..., k] for k in range(len(view.names))}
        return found

    def _weigh_losses(self, at: Any) -> dict[Path, Any]:
        """Returns the sum of the weights of each head inside."""
        return {path: x.weight for path, x in self._read_views(np.nan, at)[0].items() if path[-1] == AVERAGE_LOSS}

    @property
    def _lead(self) -> int:
        """The number of leading axes of the state. In values, they come before the axis of replicas or slices."""
        return np.ndim(self.state) - 2

    def _require_slices(self, what: str) -> Slices:
        if (found := self.head.slices) is None:
            raise ValueError(f'{what} needs a head with slices, slices=jh.Slices("origin", 3). Given {self.head!r}.')
        return found

    def _count_elements(self, at: Any) -> dict[str | None, Any]:
        """Returns how many elements weigh anything: by head of a `MultiHead`, and under None the largest number."""
        views, _, _, xp = self._read_views(np.nan, at)
        counts = {path[:-1]: view for path, view in views.items() if path[-1] == COUNT}
        by_head: dict[str | None, Any] = {path[-1]: view for path, view in counts.items() if path}
        return {None: functools.reduce(xp.maximum, counts.values()), **by_head}

    def _check_confidence(self, confidence: Any, what: str = "compute(confidence=...)") -> None:
        if not isinstance(confidence, (int, float)) or not 0 < confidence < 1:
            raise ValueError(f"confidence must be a number between 0 and 1, such as 0.95. Given {confidence!r}.")
        if self.head.bootstrap is None:
            raise ValueError(
                f"{what} reads bootstrap replicas. Given {self.head!r}, which keeps none: build it "
                "with bootstrap=jh.Bootstrap(200), and give a key to every update."
            )

    def _warn_of_input(self, bad: Any, xp: Any) -> None:
        """Warns of illegal input and of tiny weights, if the state is on the host."""
        if xp is not np:
            return
        if np.any(bad > 0):
            warnings.warn(
                f"{int(np.sum(bad))} elements had an illegal label, weight or slice and were left out of the metrics "
                f"of {self.head!r}. Call the head eagerly with check=True to see which.",
                BadInputWarning,
                stacklevel=3,
            )
        weights = self._weigh_losses((0, 0)).values()
        if any(np.any((weight > 0) & (weight < SMALLEST_SUM)) for weight in weights):
            warnings.warn(
                f"The weights add up to {min(float(np.min(w)) for w in weights):.3g}. Below {SMALLEST_SUM:g} float32 "
                "loses a part of them, and the metrics are wrong. Multiply all weights by one number: no mean depends "
                "on it.",
                BadInputWarning,
                stacklevel=3,
            )

    def _warn_of_bins(self, *values: Mapping[Any, Any]) -> None:
        """Warns once that the bins are too coarse, if they leave a metric among these values open.

        The values are not those of small slices. There, two rows that share a bin leave a metric open, however narrow
        the bin is.
        """
        for found in values:
            intervals = {key: value for key, value in found.items() if isinstance(value, Interval)}
            if any(np.any(interval.is_wide()) for interval in intervals.values()):
                from jaxheads.metrics import text

                line = text.describe_bins(intervals, self._read_histograms().values())
                warnings.warn(f"Metrics of {self.head!r}: {line}", GridWarning, stacklevel=3)
                return

    def _read_values(self, undefined: float, at: Any = (0, 0)) -> tuple[dict[tuple[str, str | None], Any], Any, Any]:
        """Returns values and intervals by key and name of the head; the bad count; the array module in use."""
        seen, bad, regularization, xp = self._read_views(undefined, at)
        values = dict(self.head.read(seen))
        if regularization is not None and at == (0, 0):
            mean = View(xp, undefined).ratio(regularization[..., 0], regularization[..., 1])
            values[REGULARIZATION_LOSS, self.head.suffix] = mean
        return values, bad, xp

    def _read_replicas(self, undefined: float, at: Any) -> dict[tuple[str, str | None], Any]:
        """Returns values of the replicas, NaN where a replica has none. In means over classes, `undefined` counts."""
        values, _, xp = self._read_values(np.nan, at)
        if np.isnan(undefined):
            return values
        counted = {key: find_middle(value) for key, value in self._read_values(undefined, at)[0].items()}
        return {key: xp.where(xp.isnan(x := find_middle(value)), x, counted[key]) for key, value in values.items()}

    def curve(
        self,
        kind: str,
        key: str | None = None,
        *,
        slice: int | str | None = None,
        class_name: int | str | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the points of a curve, on the host: of all entries of the rows, or of one class against the others.

        Args:
            kind: `"roc"` for `fpr, tpr, thresholds`; `"pr"` for `precision, recall, thresholds`. Thresholds are
                probabilities.
            key: the key of the scores, for a head that keeps several histograms.
            slice: number or name of a slice, for the curve of its data alone.
            class_name: number or name of a class, for its curve alone. The head must keep a histogram of the class, as
                it does beside a metric of each class, `jh.metrics.RocAuc(average=None)`.

        Raises:
            ValueError: another kind; no such histogram, slice or class; a state with leading axes or inside `jit`.

        Warns:
            GridWarning: as `compute`, of all data, and of a slice of at least 100 elements; also of the class.

        >>> import jaxheads as jh
        >>> head = jh.MultiLabelHead(2, label_vocabulary=("sea", "sun"))
        >>> head = head.with_metrics(jh.metrics.RocAuc(average="macro"))
        >>> metrics = head.measure(labels=[[1, 0], [0, 1], [0, 0]], logits=[[1.0, 0.5], [-1.0, 2.0], [2.5, -1.5]])
        >>> fpr, tpr, thresholds = metrics.curve("roc", class_name="sun")
        >>> bool(tpr[fpr == 0].max() == 1)  # the one row with "sun" has the highest score
        True
        """
        if not brief.is_one_of(kind, ("roc", "pr")):
            raise ValueError(f'curve() knows "roc" and "pr". Given {brief.tell(kind)}.')
        at = self._find_entry("curve()", slice)
        view = self._read_histograms(at)[self._find_scores("curve()", key, at)]
        if class_name is not None:
            view = self._find_histogram("curve()", view, class_name)
        entries = [(0, 0)]
        if slice is not None and self._count_elements(at)[None] >= _MANY:
            entries.append(at)
        with np.errstate(all="ignore"):
            values = [self._read_values(np.nan, entry)[0] for entry in entries]
            if class_name is not None and at in entries:
                areas = {"auc": view.roc_auc(), "auc_precision_recall": view.pr_auc()}
                values.append({(join_names(area, str(class_name)), None): x for area, x in areas.items()})
        self._warn_of_bins(*values)
        return view.roc_curve() if kind == "roc" else view.pr_curve()

    def reliability(
        self,
        bins: int = 10,
        key: str | None = None,
        *,
        slice: int | str | None = None,
        class_name: int | str | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns `predicted, observed, weight`: mean predicted probability against observed frequency.

        They are in `bins` equal steps; steps without data are left out. For a `MultiClassHead` it is the probability of
        the predicted class against the frequency of a right prediction. It is exact if the head keeps
        `jh.metrics.ExpectedCalibrationError(bins)` with as many bins, which a `MultiClassHead` must; else probabilities
        are those of the histogram's bins (their middles).

        With a `class_name` it is the probability of this class against its frequency, also for a `MultiClassHead`. It
        is exact if the head keeps `jh.metrics.ExpectedCalibrationError(bins, average=None)`; else the head must keep a
        histogram of the class. The other arguments are those of `curve`.

        Raises:
            ValueError: no number of bins; no such histogram, slice or class; a state with leading axes or inside `jit`.
        """
        if not inputs.is_integer(bins, 1, 10**6):
            raise ValueError(f"reliability() needs a number of bins, from 1 to a million. Given {bins!r}.")
        at = self._find_entry("reliability()", slice)
        views = self._read_views(np.nan, at)[0]
        if class_name is not None:
            return self._find_reliability(bins, key, class_name, views, at)
        whole = [view for path, view in views.items() if path[-1] == calibration_key(bins, whole=True)]
        if key is None and len(whole) == 1:
            return whole[0].reliability()
        exact = f"Keep its curve: head.with_metrics(jh.metrics.ExpectedCalibrationError({bins})). Given {self.head!r}."
        if not any(isinstance(view, ScoresView) for view in views.values()):
            raise ValueError(f"reliability() reads a score histogram, or bins of calibration. {exact}")
        path = self._find_scores("reliability()", key, at)
        kept = views.get((*path[:-1], calibration_key(bins))) if path[-1] == SCORES else None
        if kept is None and views[path].exclusive:
            raise ValueError(
                "reliability() of one of many classes is that of the predicted class, which no histogram tells. "
                f"{exact}"
            )
        return views[path].reliability(bins) if kept is None else kept.reliability()

    def confusion_matrix(
        self,
        normalize: Normalize = None,
        names: bool = False,
        *,
        threshold: float | None = None,
        key: str | None = None,
        slice: int | str | None = None,
    ) -> Any:
        """Returns the confusion matrix `[n, n]`, on the host: weights by label (rows) and predicted class (columns).

        A head of two classes and one logit has it without any metric of `with_metrics`: its score histogram tells
        `[[TN, FP], [FN, TP]]`. A `MultiClassHead` must keep `jh.metrics.ConfusionMatrix()`.

        Args:
            normalize: None, or the sum to divide by: `"true"`, of each row; `"pred"`, of each column; `"all"`, of all.
                An entry without such a sum is NaN.
            names: whether to name rows and columns. The result is then a dict by predicted class of dicts by label,
                which `pandas.DataFrame` takes as it is: a row for each label, a column for each predicted class.
            threshold: for two classes and one logit: one of the head's thresholds, or that of one of its metrics.
                Scores above it are predicted as the second class. By default z > 0, which is a threshold of 0.5.
            key: the key of the observation, for a `MultiHead` of several heads of classes: `"NAME/scores"` or
                `"NAME/confusion"`.
            slice: number or name of a slice, for its data alone.

        Raises:
            ValueError: a state with leading axes or inside `jit`, no confusion matrix, a threshold that is not kept.

        >>> import jaxheads as jh
        >>> head = jh.BinaryClassHead(label_vocabulary=("ham", "spam"), thresholds=(0.3,))
        >>> metrics = head.measure(labels=["spam", "spam", "ham", "ham"], logits=[[2.0], [-0.5], [-1.0], [0.5]])
        >>> metrics.confusion_matrix("true", threshold=0.3)
        array([[0.5, 0.5],
               [0. , 1. ]], dtype=float32)
        >>> metrics.confusion_matrix(names=True)  # by predicted class, then by label
        {'ham': {'ham': 1.0, 'spam': 1.0}, 'spam': {'ham': 1.0, 'spam': 1.0}}
        """
        check_normalize("confusion_matrix()", normalize)
        inputs.check_switch("names", names)
        at = self._find_entry("confusion_matrix()", slice)
        view, classes = self._find_decisions(key, at, threshold)
        with np.errstate(all="ignore"):
            matrix = np.asarray(view.normalized(normalize), np.float32)
        if not names:
            return matrix
        by_prediction = zip(classes, matrix.T.tolist(), strict=True)
        return {name: dict(zip(classes, column, strict=True)) for name, column in by_prediction}

    def _find_decisions(self, key: str | None, at: tuple[int, int], threshold: float | None) -> tuple[Any, Any]:
        """Returns the decisions for one of two or more classes that are meant, and the names of the classes."""
        found: dict[str, tuple[Path, Any]] = {}
        for path, view in self._read_views(np.nan, at)[0].items():
            if path[-1] == CONFUSION or (isinstance(view, ScoresView) and len(view.names) == 1):
                found[join_names(*path)] = path, view
        if key is None and len(found) == 1:
            key = next(iter(found))
        if not isinstance(key, str) or key not in found:
            raise ValueError(
                "confusion_matrix() reads the histogram of one logit, or a table that "
                f"head.with_metrics(jh.metrics.ConfusionMatrix()) keeps. Given key={key!r}, and a head with "
                f"{brief.tell_names(found)}: {brief.cut(repr(self.head), 120)}."
            )
        path, view = found[key]
        if not isinstance(view, ScoresView):
            if threshold is not None:
                raise ValueError(
                    f"confusion_matrix() has a threshold for two classes and one logit. Given threshold={threshold!r} "
                    "for decisions by the largest logit. Leave it out."
                )
            return view, view.names
        known = view.layout.position
        if threshold is not None and threshold != 0.5 and threshold not in known:
            raise ValueError(
                f"confusion_matrix() is exact at a threshold that is an edge of the bins: one of {[0.5, *known][:5]}. "
                f"Given {threshold!r}. Build the head with thresholds=(...,), or with_metrics("
                "jh.metrics.ConfusionMatrix(threshold=...))."
            )
        decided = view.at_zero() if threshold == 0.5 and threshold not in known else view.decide(threshold)
        return decided, _find_names(self.head, path) or ("0", "1")

    def _find_entry(self, what: str, slice: int | str | None) -> tuple[int, int]:
        """Returns the place of a slice in the state. Refuses all but one concrete state, and too small a slice."""
        self._check_concrete(what)
        if slice is None:
            return 0, 0
        slices = self._require_slices(what)
        names = slices.names or ()
        index = names.index(slice) if slice in names else slice
        if not inputs.is_integer(index, 0, slices.n - 1):
            known = f"0 to {slices.n - 1}" + (f", called {', '.join(names)}" if names else "")
            raise ValueError(f"{what}: the head's slices are {known}. Given slice={slice!r}.")
        at = 0, 1 + int(index)
        if (count := self._count_elements(at)[None]) < slices.min_count:
            raise ValueError(
                f"{what}: slice {slice!r} has {count:g} elements, fewer than min_count={slices.min_count}: too few for "
                "metrics."
            )
        return at

    def _check_concrete(self, what: str) -> None:
        """Refuses all but one concrete state."""
        if isinstance(self.state, Tracer) or np.ndim(self.state) != 2:
            raise ValueError(
                f"{what} reads one concrete state, outside jit. Given {self!r}. Merge several states in one "
                "with metrics.sum(), or take one, metrics[0]."
            )

    def _find_reliability(
        self, bins: int, key: str | None, class_name: int | str, views: Mapping[Path, Any], at: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the calibration of one class, from bins of its own if these are kept, else from its histogram."""
        exact = [path for path in views if path[-1] == calibration_key(bins)]
        scores = [path for path, view in views.items() if isinstance(view, ScoresView)]
        if key is None and len({path[:-1] for path in (*exact, *scores)}) == 1 and exact:
            kept = views[exact[0]]
        else:
            path = self._find_scores("reliability()", key, at)
            kept = views.get((*path[:-1], calibration_key(bins))) if path[-1] == SCORES else None
            if kept is None:
                return self._find_histogram("reliability()", views[path], class_name).reliability(bins)
        return kept.of_class(self._find_class("reliability()", kept.names, class_name)).reliability()

    def _find_histogram(self, what: str, view: ScoresView, class_name: int | str) -> ScoresView:
        """Returns the histogram of one class."""
        column = self._find_class(what, view.names, class_name)
        if column not in view.columns:
            raise ValueError(
                f"{what} reads a histogram of class {brief.tell(class_name)}. The head keeps one of all classes "
                "together. Keep one of each: head.with_metrics(jh.metrics.RocAuc(average=None)). Given "
                f"{brief.cut(repr(self.head), 120)}."
            )
        return view.columns[column]

    def _find_class(self, what: str, names: tuple[str, ...], class_name: int | str) -> int:
        """Returns the number of a class that is given by number or name."""
        if len(names) < 2:
            raise ValueError(f"{what} has a class_name, and the head has scores of one class. Leave it out.")
        index = names.index(class_name) if isinstance(class_name, str) and class_name in names else class_name
        if not inputs.is_integer(index, 0, len(names) - 1):
            raise ValueError(
                f"{what}: class_name must be from 0 to {len(names) - 1}, or one of {brief.tell(list(names))}. Given "
                f"{brief.tell(class_name)}."
            )
        return int(index)

    def _find_scores(self, what: str, key: str | None, at: tuple[int, int]) -> Path:
        """Returns the path of the one score histogram that is meant."""
        paths = {join_names(*path): path for path in self._read_histograms(at)}
        if key is None and len(paths) == 1:
            return next(iter(paths.values()))
        if not isinstance(key, str) or key not in paths:
            raise ValueError(
                f"{what} reads one score histogram. {self.head!r} keeps {len(paths)}: {list(paths)}. Given key={key!r}."
            )
        return paths[key]

    def _read_histograms(self, at: tuple[int, int] = (0, 0)) -> dict[Path, ScoresView]:
        return {path: view for path, view in self._read_views(np.nan, at)[0].items() if isinstance(view, ScoresView)}

    def __repr__(self) -> str:
        from jaxheads.metrics import text

        title = f"Metrics of {self.head!r}"
        if kind := text.kind(self.state, slots(self.head, self.regularized)[1]):
            return f"{title}: {kind}"
        with np.errstate(all="ignore"):
            values, bad, _ = self._read_values(np.nan)
            return "\n".join([title, *text.table(values, bad, self._read_histograms().values())])

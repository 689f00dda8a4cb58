"""`Metrics`: one pytree a head, whose arrays add."""

import copy
import dataclasses
import functools
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxheads.metrics.base import Observation, View
from jaxheads.metrics.curves import Interval, ScoresView
from jaxheads.metrics.groups import Grouped, Slices
from jaxheads.numerics import meshes, pairs


class BadInputWarning(UserWarning):
    """Elements with an illegal label or weight were left out of the metrics."""


class Reader(Protocol):
    """What a state asks of its head."""

    @property
    def suffix(self) -> str | None: ...

    def observed(self) -> Mapping[str, Observation]: ...

    def read(self, seen: Mapping[str, Any]) -> Mapping[tuple[str, str | None], Any]: ...


@functools.lru_cache(maxsize=1024)
def slots(head: Any, regularized: bool) -> tuple[dict[str, tuple[int, Observation]], int]:
    """Where each observation of a head begins in its packed state, and the size of the state.

    Slot 0 counts the bad elements; then the regularization's mean, if there is one; then what the head observes.
    """
    offset, layout = (3 if regularized else 1), {}
    for key, observation in head.observed().items():
        layout[key] = (offset, observation)
        offset += observation.size
    return layout, offset


@functools.lru_cache(maxsize=1024)
def metric_names(head: Any) -> tuple[str, ...]:
    """The full names of a head's metrics."""
    zero = Metrics(np.zeros((slots(head, False)[1], 1), np.float32), head)
    with np.errstate(all="ignore"):
        return tuple(joined(*key) for key in zero._values(np.nan)[0])


_add = jax.jit(pairs.add)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Metrics:
    """The metric state of a head: additive arrays, packed in one.

    `a + b` merges. The trailing axis of `state` is a compensated pair, or of size 1 for the plain float32 sums of a
    single batch (`head.measure`). Any leading axis (devices, slices, replicas) passes through `+`, `psum` and
    `compute`.

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
    np.float32(2.0)
    """

    state: Any
    head: Any = dataclasses.field(metadata={"static": True})
    regularized: bool = dataclasses.field(default=False, metadata={"static": True})

    def __add__(self, other: "Metrics") -> "Metrics":
        """The metrics of both sets of data."""
        if not isinstance(other, Metrics):
            return NotImplemented
        self.check_same_kind(other)
        self.check_size()
        other.check_size()
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

    @classmethod
    def merge(cls, states: "Iterable[Metrics]") -> "Metrics":
        """The metrics of all states, added on the host in float64: no device is needed, nor is one touched.

        For the combiners of Beam, Ray or Spark, and for states that processes computed on their own: pickled, a state
        is a NumPy array, as is what this returns.

        Args:
            states: at least one, of equal leading axes.

        Raises:
            ValueError: no states, states of different heads or shapes.

        >>> import jax, numpy as np
        >>> import jaxheads as jh
        >>> head = jh.RegressionHead()
        >>> parts = [head.measure(labels=np.array([y]), logits=np.array([[0.0]], np.float32)) for y in (1.0, 2.0)]
        >>> jh.Metrics.merge(parts).compute()["average_loss"]  # (1 + 4) / 2
        np.float32(2.5)
        """
        if isinstance(states, Metrics):
            raise ValueError("merge() takes several states. Given one Metrics alone; of one, pass a list, [metrics].")
        states = list(states)
        if not states or not all(isinstance(state, Metrics) for state in states):
            kinds = sorted({type(state).__name__ for state in states})
            raise ValueError(f"merge() needs at least one Metrics, and nothing else. Given {kinds or 'nothing'}.")
        first = states[0]
        for state in states:
            first.check_same_kind(state)
            state.check_size()
        leads = {np.shape(state.state)[:-2] for state in states}
        if len(leads) > 1:
            raise ValueError(f"merge() adds states of equal leading axes. Given {sorted(leads)} of {first.head!r}.")
        if any(isinstance(state.state, Tracer) for state in states):
            raise ValueError("merge() works on the host, outside jit. There, metrics add: a + b.")
        # As on a device, what overflows is inf and inf - inf is NaN, without a word.
        with np.errstate(over="ignore", invalid="ignore"):
            return dataclasses.replace(first, state=pairs.merge([_on_host(state.state) for state in states]))

    def __reduce__(self) -> Any:
        # Where it is unpickled there may be no device.
        state = np.asarray(_on_host(self.state)) if isinstance(self.state, jax.Array) else self.state
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

    def check_size(self) -> None:
        """Refuses a state of another number of slots than the head keeps: a checkpoint of another configuration."""
        given, expected = jnp.shape(self.state), slots(self.head, self.regularized)[1]
        if len(given) < 2 or given[-2] != expected or given[-1] not in (1, 2):
            raise ValueError(
                f"This state does not fit its head. Given shape {given}, expected [..., {expected}, 1 or 2] for "
                f"{self.head!r}{' with regularization' if self.regularized else ''}. Was it saved by a head of other "
                "bins, thresholds or metrics?"
            )

    def psum(self, axis_name: Any) -> "Metrics":
        """The merged metrics of all devices along `axis_name`, the same on each, in one all-reduce."""
        return dataclasses.replace(self, state=pairs.psum(self.state, axis_name))

    def varying(self, axis_name: Any) -> "Metrics":
        """The same values, typed as differing over `axis_name`: the first carry of a scan inside `shard_map`."""
        meshes.check_axis(axis_name)
        return dataclasses.replace(self, state=jax.lax.pcast(self.state, axis_name, to="varying"))

    def _views(self, undefined: float, at: Any = (0, 0)) -> tuple[dict[str, Any], Any, Any, Any]:
        """Views by key, `at` those replicas and groups; the bad count; the regularization; the array module in use."""
        self.check_size()
        if isinstance(self.state, Tracer):
            xp, pair = jnp, self.state
        else:
            # In float64 on the host: exact, one transfer, and nothing to compile.
            xp, pair = np, np.asarray(_on_host(self.state), np.float64)
        sums = pair.sum(-1)
        layout, _ = slots(self.head, self.regularized)

        def view(start: int, observation: Observation) -> Any:
            part = sums[..., start : start + observation.size]
            if isinstance(observation, Grouped):
                return observation.read(part, xp, undefined, at)
            return observation.read(part, xp, undefined)

        views = {key: view(start, observation) for key, (start, observation) in layout.items()}
        return views, sums[..., 0], sums[..., 1:3] if self.regularized else None, xp

    def compute(
        self, undefined: float = np.nan, bounds: bool = False, confidence: float | None = None
    ) -> dict[str, Any]:
        """The metrics by name, as float32 scalars (arrays, if the state has a leading axis).

        Args:
            undefined: what a metric whose denominator is zero reads as; 0.0 is TensorFlow's convention.
            bounds: also give `auc/lower`, `auc/upper` and their like: the interval that holds what the same scores
                would give without bins.
            confidence: also give `auc/ci_lower`, `auc/ci_upper`, of every metric: the middle `confidence` of the
                bootstrap replicas (the percentile interval). The head needs `bootstrap=jh.Bootstrap(200)`.

        Warns:
            BadInputWarning: outside `jit`, if elements with an illegal label or weight were left out.
        """
        with jax.debug_nans(False), np.errstate(all="ignore"):
            values, bad, xp = self._values(undefined)
        self._warn(bad, xp)
        out = _named(values, bounds, xp)
        if confidence is not None:
            self._check_confidence(confidence)
            with jax.debug_nans(False), np.errstate(all="ignore"):
                replicas, *_ = self._values(np.nan, (slice(1, None), 0))
                measured = values if np.isnan(undefined) else self._values(np.nan)[0]
            out |= _quantiles(replicas, measured, confidence, undefined, xp, self._lead)
        return out

    def by_slice(self, undefined: float = np.nan, confidence: float | None = None) -> dict[str, Any]:
        """The metrics of each slice: arrays `[n]` by name, with `slice` (the names) and `count` first.

        Fit for `pandas.DataFrame(metrics.by_slice())`. Where fewer than `min_count` elements weigh anything, a slice
        has no metrics: they are undefined. Inside `jit` there are no names.

        Args:
            undefined, confidence: as for `compute`.

        >>> import numpy as np
        >>> import jaxheads as jh
        >>> head = jh.RegressionHead(slices=jh.Slices("origin", 2, names=("JFK", "LGA")))
        >>> features, logits = {"origin": np.array([0, 1, 1])}, np.zeros((3, 1), np.float32)
        >>> found = head.measure(labels=[1.0, 2.0, 4.0], logits=logits, features=features).by_slice()
        >>> found["slice"].tolist(), found["count"].tolist(), found["label/mean"].tolist()
        (['JFK', 'LGA'], [1.0, 2.0], [1.0, 3.0])
        """
        slices = self._slices()
        with jax.debug_nans(False), np.errstate(all="ignore"):
            values, bad, xp = self._values(undefined, (0, slice(1, None)))
            counts = self._counts((0, slice(1, None)))
            small = {name: count < slices.min_count for name, count in counts.items()}

            def too_small(name: str | None) -> Any:
                # In a MultiHead each head has seen rows of its own; elsewhere there is one count.
                return small[name] if name in small else small[None]

            out = _named({key: _without(x, too_small(key[1]), undefined, xp) for key, x in values.items()}, False, xp)
            if confidence is not None:
                self._check_confidence(confidence)
                replicas, *_ = self._values(np.nan, (slice(1, None), slice(1, None)))
                measured = values if np.isnan(undefined) else self._values(np.nan, (0, slice(1, None)))[0]
                measured = {key: _without(x, too_small(key[1]), np.nan, xp) for key, x in measured.items()}
                out |= _quantiles(replicas, measured, confidence, undefined, xp, self._lead)
        self._warn(bad, xp)
        names = {} if xp is jnp else {"slice": np.asarray(slices.names or tuple(range(slices.n)))}
        shown = {joined("count", name): _float32(count, xp) for name, count in counts.items()}
        return {**names, **shown, **out}

    @property
    def _lead(self) -> int:
        """How many leading axes the state has: before the axis of replicas or slices in what is read."""
        return np.ndim(self.state) - 2

    def _slices(self) -> Slices:
        if not isinstance(found := getattr(self.head, "slices", None), Slices):
            raise ValueError(
                f'by_slice() needs a head with slices, slices=jh.Slices("origin", 3). Given {self.head!r}.'
            )
        return found

    def _counts(self, at: Any) -> dict[str | None, Any]:
        """How many elements weigh anything: by head of a `MultiHead`, and of that with the most under None."""
        views, _, _, xp = self._views(np.nan, at)
        paths = {tuple(key.split("/")): view for key, view in views.items() if key.split("/")[-1] == "slice_count"}
        by_head: dict[str | None, Any] = {path[-2]: view for path, view in paths.items() if len(path) > 1}
        return {None: functools.reduce(xp.maximum, paths.values()), **by_head}

    def _check_confidence(self, confidence: Any) -> None:
        if not isinstance(confidence, (int, float)) or not 0 < confidence < 1:
            raise ValueError(f"confidence must be a number between 0 and 1, such as 0.95. Given {confidence!r}.")
        if getattr(self.head, "bootstrap", None) is None:
            raise ValueError(
                f"compute(confidence=...) reads bootstrap replicas. Given {self.head!r}, which keeps none: build it "
                "with bootstrap=jh.Bootstrap(200), and give a key to every update."
            )

    def _warn(self, bad: Any, xp: Any) -> None:
        if xp is np and np.any(bad > 0):
            warnings.warn(
                f"{int(np.sum(bad))} elements had an illegal label, weight or slice and were left out of the metrics "
                f"of {self.head!r}. Call the head eagerly with check=True to see which.",
                BadInputWarning,
                stacklevel=3,
            )

    def _values(self, undefined: float, at: Any = (0, 0)) -> tuple[dict[tuple[str, str | None], Any], Any, Any]:
        """Values and intervals by key and name of the head; the bad count; the array module in use."""
        seen, bad, regularization, xp = self._views(undefined, at)
        values = dict(self.head.read(seen))
        if regularization is not None and at == (0, 0):
            mean = View(xp, undefined).ratio(regularization[..., 0], regularization[..., 1])
            values["regularization_loss", self.head.suffix] = mean
        return values, bad, xp

    def curve(self, kind: str, key: str | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The points of a curve, on the host.

        Args:
            kind: `"roc"` for `fpr, tpr, thresholds`; `"pr"` for `precision, recall, thresholds`. Thresholds are
                probabilities.
            key: under which the head observes the scores, where it keeps several histograms.
        """
        if kind not in ("roc", "pr"):
            raise ValueError(f'curve() knows "roc" and "pr". Given {kind!r}.')
        view = self._scores("curve()", key)
        return view.roc_curve() if kind == "roc" else view.pr_curve()

    def reliability(self, bins: int = 10, key: str | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`predicted, observed, weight`: mean predicted probability against observed frequency.

        Probabilities are those of the histogram's bins (their middles), grouped in `bins` equal steps; steps without
        data are left out.
        """
        if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
            raise ValueError(f"reliability() needs a positive integer number of bins. Given {bins!r}.")
        return self._scores("reliability()", key).reliability(bins)

    def _scores(self, what: str, key: str | None) -> ScoresView:
        if isinstance(self.state, Tracer) or np.ndim(self.state) != 2:
            raise ValueError(
                f"{what} reads one concrete state, outside jit. Given {self!r}. Merge devices with .psum first, or "
                "take one entry with jax.tree.map(lambda x: x[0], metrics)."
            )
        views = self._histograms()
        if key in views:
            return views[key]
        if key is not None or len(views) != 1:
            raise ValueError(
                f"{what} reads one score histogram. {self.head!r} keeps {len(views)}: {list(views)}. Given key={key!r}."
            )
        return next(iter(views.values()))

    def _histograms(self) -> dict[str, ScoresView]:
        return {key: view for key, view in self._views(np.nan)[0].items() if isinstance(view, ScoresView)}

    def __repr__(self) -> str:
        title = f"Metrics of {self.head!r}"
        state = self.state
        concrete = isinstance(state, (jax.Array, np.ndarray)) and not isinstance(state, Tracer)
        if not concrete or state.ndim != 2:
            kind = getattr(state, "dtype", type(state).__name__)
            return f"{title}: {kind}{list(getattr(state, 'shape', ()))}"
        if isinstance(state, jax.Array) and state.is_deleted():
            return f"{title}: {state.dtype}{list(state.shape)}, deleted (it was donated to a compiled function)"
        if isinstance(state, jax.Array) and not _addressable(state):
            return f"{title}: {state.dtype}{list(state.shape)}, not addressable from here"
        if state.shape[0] != slots(self.head, self.regularized)[1]:
            return f"{title}: {state.dtype}{list(state.shape)}, which does not fit the head"
        with np.errstate(all="ignore"):
            values, bad, _ = self._values(np.nan)
        width = max(len(joined(*key)) for key in values)
        lines = [title]
        for key, value in values.items():
            middle = value.value if isinstance(value, Interval) else value
            shown = f"{middle:.6g}" if np.ndim(middle) == 0 else np.array2string(np.asarray(middle), precision=6)
            lines.append(f"  {joined(*key):<{width}}  {shown}")
        if bad > 0:
            lines.append(f"  {int(bad)} elements had an illegal label or weight and were left out.")
        wide: dict[str, list[str]] = {}
        for key, value in values.items():
            if isinstance(value, Interval) and np.ndim(value.value) == 0 and value.is_wide():
                shown = f"{joined(*key)} in [{value.lower:.4g}, {value.upper:.4g}]"
                wide.setdefault(value.mend, []).append(shown)
        if binned := wide.pop("", None):
            advice = next((view.advice() for view in self._histograms().values() if view.is_coarse()), "a finer grid")
            lines.append(
                f"  The grid is too coarse for these scores: {', '.join(binned)}. "
                f"Mend it with bins={advice}; scores that are equal no grid can tell apart."
            )
        for mend, rounded in wide.items():
            lines.append(
                f"  The spread of these numbers is lost in float32 sums of their squares: {', '.join(rounded)}. "
                f"Mend it with {mend}, about the mean of the labels; where all are equal there is none."
            )
        return "\n".join(lines)


def _named(values: Mapping[tuple[str, str | None], Any], bounds: bool, xp: Any) -> dict[str, Any]:
    """Values by their full names, with the ends of intervals if they are asked for."""
    out = {}
    for key, value in values.items():
        interval = value if isinstance(value, Interval) else Interval(value, None, None)
        out[joined(*key)] = _float32(interval.value, xp)
        if bounds and interval.lower is not None:
            out[joined(key[0], "lower", key[1])] = _float32(interval.lower, xp)
            out[joined(key[0], "upper", key[1])] = _float32(interval.upper, xp)
    return out


def _quantiles(
    replicas: Mapping[tuple[str, str | None], Any],
    measured: Mapping[tuple[str, str | None], Any],
    confidence: float,
    undefined: float,
    xp: Any,
    axis: int,
) -> dict[str, Any]:
    """`KEY/ci_lower` and `KEY/ci_upper`, over the replicas that have a value; both were read with NaN for undefined.

    What has no value itself, has no interval: a NaN among the data shows, though replicas may have missed it.
    """
    out = {}
    for (key, name), value in replicas.items():
        each, whole = (x.value if isinstance(x, Interval) else x for x in (value, measured[key, name]))
        for end, q in (("ci_lower", (1 - confidence) / 2), ("ci_upper", (1 + confidence) / 2)):
            found = xp.where(xp.isnan(whole), whole, _nanquantile(each, q, axis, xp))
            out[joined(key, end, name)] = _float32(xp.where(xp.isnan(found), undefined, found), xp)
    return out


def _nanquantile(x: Any, q: float, axis: int, xp: Any) -> Any:
    if xp is jnp:
        return jnp.nanquantile(x, q, axis=axis)
    with warnings.catch_warnings():
        # Where no replica has a value, there is none: NaN, and no need to say so twice.
        warnings.filterwarnings("ignore", "All-NaN", RuntimeWarning)
        return np.nanquantile(x, q, axis=axis)


def _without(value: Any, small: Any, undefined: float, xp: Any) -> Any:
    """A value, or an interval, undefined for slices that are too small."""
    if isinstance(value, Interval):
        return Interval(*(None if part is None else _without(part, small, undefined, xp) for part in value))
    # A metric may be an array: a confusion matrix.
    small = xp.expand_dims(small, tuple(range(np.ndim(small), np.ndim(value))))
    return xp.where(small, xp.full_like(value, undefined), value)


def joined(*parts: str | None) -> str:
    """The full name of a metric or a summary from its key and, where there is one, the name of its head."""
    return "/".join(part for part in parts if part)


def _float32(value: Any, xp: Any) -> Any:
    return jnp.asarray(value, jnp.float32) if xp is jnp else np.float32(value)


def _addressable(state: jax.Array) -> bool:
    return state.is_fully_addressable or state.is_fully_replicated


def _on_host(state: Any) -> Any:
    if isinstance(state, jax.Array) and not _addressable(state):
        raise ValueError(
            f"These metrics are spread over processes: state {state.shape} with sharding {state.sharding}. Merge them "
            "with .psum(axis_name) inside the step, so that every process holds the total."
        )
    return state

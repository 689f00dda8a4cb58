"""The heads that every law is tested on: an instance, a label sampler and a float64 oracle each.

A new head adds one `Entry`. Oracles are NumPy formulas that do not call the library.
"""

import dataclasses
import itertools
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxheads as jh
from jaxheads.numerics import duals, pairs, stable


@dataclasses.dataclass(frozen=True)
class Entry:
    """A head under test.

    Attributes:
        name: the test id.
        head: the instance.
        labels: `(rng, lead) -> labels`, legal ones, of the leading shape plus the last axis.
        losses: `(labels, logits, params) -> float64 losses [..., 1 or d]`, the oracle.
        metrics: `(labels, logits, weights, params) -> dict`, float64 values of the other metrics by name, from the
            dense rows alone (`weights [..., 1]`, all positive); absent for what has no closed form.
        count: `labels -> [..., 1 or d]`, the oracle of a term's own element count; None for one an element.
        illegal: a label that must be refused, or None if every finite number is legal.
        parts: the entries of the heads of a `MultiHead`, in order.
        averaged: the oracle of `average_loss`, where that is not the mean of `losses`.
        whole: `(labels, logits, weights) -> float64`, the mean loss, where it is of pairs and `losses` says nothing.
        multipliers: what learned fields hold in `params`, where their first values would hide what they do.
        counted: `(labels, weights) -> float64`, what a batch adds to running counts; positives and all, if it has any.
        running: whether it has running state.
        closed: whether its best constant logits have a closed form.
        slow: whether its laws are among the slow tests.
    """

    name: str
    head: jh.Head
    labels: Callable[[np.random.Generator, tuple[int, ...]], Any]
    losses: Callable[[Any, np.ndarray, Any], np.ndarray]
    metrics: Callable[[Any, np.ndarray, np.ndarray, Any], dict[str, float]] = lambda *_: {}
    count: Callable[[Any], np.ndarray] | None = None
    illegal: float | None = None
    parts: "tuple[Entry, ...]" = ()
    averaged: Callable[[Any, np.ndarray, Any], np.ndarray] | None = None
    whole: Callable[[Any, np.ndarray, np.ndarray], float] | None = None
    counted: Callable[[Any, np.ndarray], np.ndarray] = lambda y, w: np.stack([(w * y).sum(0), (w + 0 * y).sum(0)])
    multipliers: dict[str, Any] = dataclasses.field(default_factory=dict, compare=False)
    running: bool = False
    closed: bool = False
    slow: bool = False

    def optimizer(self, optimizer: Any, dual_optimizer: Any = None) -> Any:
        """An optimizer for what this head learns: of multipliers it ascends, by the same or another."""
        learns = duals.count_multipliers(self.head.init(jax.random.key(0)))
        return jh.training.primal_dual(optimizer, dual_optimizer or optimizer) if learns else optimizer

    def params(self) -> dict[str, Any]:
        """Learned and running fields together, as `params=` takes them."""
        return {**self.head.init(jax.random.key(0)), **self.head.init_state(), **self.multipliers}

    def logits(self, rng: np.random.Generator, lead: tuple[int, ...], scale: float = 2.0) -> np.ndarray:
        return (scale * rng.standard_normal((*lead, self.head.logits_dimension))).astype(np.float32)

    def _seen(self, labels: Any, logits: Any, weights: Any, where: Any, params: Any) -> tuple[Any, ...]:
        """The rows that weigh, as a mask; all weights of those that exist; labels, logits, ... of those that weigh."""
        logits = np.asarray(logits, np.float64)
        n = int(np.prod(logits.shape[:-1]))
        weights = np.ones((n, 1)) if weights is None else np.asarray(weights, np.float64).reshape(n, -1)
        exists = np.ones(n, bool) if where is None else np.asarray(where, bool).reshape(n)
        live = exists & (weights > 0).any(-1)
        labels = jax.tree.map(lambda x: np.asarray(x).reshape(n, -1)[live], labels)
        logits = logits.reshape(n, -1)[live]
        values = self.losses(labels, logits, self.params() if params is None else params)
        counts = np.ones_like(values) if self.count is None else self.count(labels)
        return live, weights[exists], labels, logits, weights[live], values, counts

    def expected_shares(
        self,
        labels: Any,
        logits: Any,
        weights: Any = None,
        where: Any = None,
        params: Any = None,
        reduction: Any = None,
        normalizer: float | None = None,
    ) -> np.ndarray:
        """What each row adds to the loss, in float64: hidden rows nothing, whatever is in them. Of pairs one number."""
        live, existing, dense, scores, weights, values, counts = self._seen(labels, logits, weights, where, params)
        shares = np.zeros(len(live))
        shares[live] = np.where(weights > 0, values * weights, 0).sum(-1)
        if self.whole is not None:
            shares = np.array([weights.sum() * self.whole(dense, scores, weights)])
        reduction = jh.Reduction.of(self.head.loss_reduction if reduction is None else reduction)
        if normalizer is None:
            batch_size = len(existing) * values.shape[-1] if self.count is None else counts.sum()
            normalizer = {
                jh.Reduction.SUM: 1,
                jh.Reduction.SUM_OVER_BATCH_SIZE: batch_size,
                jh.Reduction.MEAN: (counts * weights).sum(),
                jh.Reduction.SUM_BY_NONZERO_WEIGHTS: (counts * (weights > 0)).sum(),
            }[reduction]
        return shares / normalizer if normalizer else np.zeros_like(shares)

    def expected_loss(self, *args: Any, **kwargs: Any) -> float:
        """The loss in float64; arguments as for `expected_shares`."""
        return float(self.expected_shares(*args, **kwargs).sum())

    def expected_metrics(
        self, labels: Any, logits: Any, weights: Any = None, where: Any = None, params: Any = None
    ) -> dict[str, float]:
        """The metrics in float64, those that have a closed form, under their full names."""
        _, _, labels, logits, weights, values, counts = self._seen(labels, logits, weights, where, params)
        params = self.params() if params is None else params
        values = values if self.averaged is None else self.averaged(labels, logits, params)
        with np.errstate(invalid="ignore", divide="ignore"):
            weight = (np.broadcast_to(counts, values.shape) * weights).sum()
            average = float((values * weights).sum() / weight) if weight else np.nan
            out = {"average_loss": average, **self.metrics(labels, logits, weights, params)}
        return {f"{key}/{self.head.suffix}" if self.head.suffix else key: value for key, value in out.items()}


def bounds_of(got: dict[str, Any], key: str) -> tuple[float, float] | None:
    """The interval of a metric that has one: `auc/lower/NAME` for `auc/NAME`."""
    parts = key.split("/")
    for i in range(1, len(parts) + 1):
        lower, upper = ("/".join([*parts[:i], end, *parts[i:]]) for end in ("lower", "upper"))
        if lower in got:
            return got[lower], got[upper]
    return None


def changed(head: Any, **changes: Any) -> Any:
    """`dataclasses.replace`; of a head made of heads, which says nothing of this itself, in all heads inside."""
    if set(changes) <= {field.name for field in dataclasses.fields(head)}:
        return dataclasses.replace(head, **changes)
    if isinstance(head, jh.SequentialHeadWrapper):
        return dataclasses.replace(head, static_head=changed(head.static_head, **changes))
    if isinstance(head, jh.GlobalObjectiveHead):
        return dataclasses.replace(head, base=changed(head.base, **changes))
    names = [{"name": f"{changes['name']}_{inner.name}"} if "name" in changes else {} for inner in head.heads]
    inside = zip(head.heads, names, strict=True)
    return dataclasses.replace(head, heads=[changed(inner, **{**changes, **name}) for inner, name in inside])


@dataclasses.dataclass(frozen=True)
class MultiEntry(Entry):
    """A `MultiHead`: its oracle is the sum of its heads'."""

    @classmethod
    def of(cls, name: str, parts: tuple[Entry, ...], head_weights: Any = None) -> "MultiEntry":
        head = jh.MultiHead([part.head for part in parts], head_weights)

        def labels(rng: np.random.Generator, lead: tuple[int, ...]) -> dict[str, Any]:
            return {str(part.head.name): part.labels(rng, lead) for part in parts}

        def losses(labels: Any, logits: Any, params: Any) -> np.ndarray:
            raise NotImplementedError("a MultiHead has no per-element loss of its own")

        return cls(name, head, labels, losses, parts=parts)

    def _each(self, labels: Any, logits: Any, params: Any):
        params = self.params() if params is None else params
        stop = 0
        for part in self.parts:
            start, stop = stop, stop + part.head.logits_dimension
            name = part.head.name
            yield part, labels[name], np.asarray(logits)[..., start:stop], params.get(name, {})

    def expected_shares(
        self,
        labels: Any,
        logits: Any,
        weights: Any = None,
        where: Any = None,
        params: Any = None,
        reduction: Any = None,
        normalizer: float | None = None,
    ) -> np.ndarray:
        factors = getattr(self.head, "head_weights", None) or (1.0,) * len(self.parts)
        shares = [
            factor * part.expected_shares(y, z, weights, where, inner, reduction, normalizer)
            for factor, (part, y, z, inner) in zip(factors, self._each(labels, logits, params), strict=True)
        ]
        return np.sum(shares, axis=0)

    def expected_metrics(
        self, labels: Any, logits: Any, weights: Any = None, where: Any = None, params: Any = None
    ) -> dict[str, float]:
        out: dict[str, float] = {}
        for part, y, z, inner in self._each(labels, logits, params):
            out |= part.expected_metrics(y, z, weights, where, inner)
        return out

    def expected_losses(
        self, labels: Any, logits: Any, weights: Any = None, where: Any = None, params: Any = None
    ) -> dict[str, float]:
        """`loss/NAME`, which weights change as the reductions say: a row of weight 2 is not that row twice."""
        return {
            f"loss/{part.head.name}": part.expected_loss(y, z, weights, where, inner)
            for part, y, z, inner in self._each(labels, logits, params)
        }


class OrdinalHead(jh.Head):
    """A cumulative-link head whose cut points are learned: proof that a head can have parameters."""

    n_classes: int = 4
    cuts: jax.Array = jh.learned(lambda head, key: jnp.linspace(-1.0, 1.0, head.n_classes - 1))

    logits_dimension = 1

    @property
    def label_spec(self):
        return jh.LabelSpec(1, "int", 0, self.n_classes - 1)

    def _log_probability(self, k, z):
        """ln P(y = k) = ln(F(c_k - z) - F(c_{k-1} - z)), where c_{-1} = -inf and the last c is inf."""
        far = jnp.full((1,), 1e30)
        # [1, n], not broadcast to the batch: on an Explicit mesh that would be laid out unlike the ids.
        cuts = jnp.expand_dims(jnp.concatenate([-far, self.cuts, far]), tuple(range(z.ndim - 1)))
        high, low = stable.pick(cuts, k + 1) - z, stable.pick(cuts, k) - z
        return -jax.nn.softplus(-high) - jax.nn.softplus(low) + jnp.log(-jnp.expm1(jnp.minimum(low - high, -1e-6)))

    def losses(self, labels, logits):
        return -self._log_probability(labels, logits)

    def outputs(self, logits):
        ids = jnp.sum((logits > jnp.expand_dims(self.cuts, tuple(range(logits.ndim - 1)))), -1, keepdims=True)
        return {"logits": logits, "class_ids": ids.astype(jnp.int32)}

    def observe(self, labels, logits):
        ids = self.outputs(logits)["class_ids"]
        return {
            "accuracy": jh.Mean(ids == labels),
            "mean_absolute_error": jh.Mean(jnp.abs(ids - labels)),
        }


class PriorCorrectedHead(jh.Head):
    """Logistic loss around the log odds of a streaming label prior: proof that a head can have running state."""

    counts: jax.Array = jh.running(lambda head: jnp.array([[1.0, 0.0], [2.0, 0.0]]))

    logits_dimension = 1

    @property
    def label_spec(self):
        return jh.LabelSpec(1, "float", 0, 1)

    def _shifted(self, logits):
        positive, total = self.counts[0, 0], self.counts[1, 0]
        return logits + jnp.log(positive / (total - positive))

    def losses(self, labels, logits):
        z = self._shifted(logits)
        return jax.nn.softplus(z) - labels * z

    def outputs(self, logits):
        return {"logistic": jax.nn.sigmoid(self._shifted(logits))}

    def advance(self, labels, logits, weights, psum):
        seen = psum(jnp.stack([jnp.sum(weights * labels), jnp.sum(weights)]))
        return {"counts": pairs.add(self.counts, seen[:, None])}


class SurvivalHead(jh.Head):
    """Exponential survival from time and event: proof of structured labels and of a count of their own (events)."""

    logits_dimension = 1
    signed = True  # a density may be above 1

    @property
    def label_spec(self):
        return {"time": jh.LabelSpec(1, "float", 0, None, 1.0), "event": jh.LabelSpec(1, "bool")}

    def losses(self, labels, logits):
        event = labels["event"].astype(jnp.float32)
        return jh.Term(labels["time"] * jnp.exp(logits) - event * logits, event)

    def outputs(self, logits):
        return {"risk": lambda: jnp.exp(logits)}

    def observe(self, labels, logits):
        return {"event_rate": jh.Mean(labels["event"])}


class TemperatureHead(jh.Head):
    """Another head on logits divided by a learned temperature: proof that heads nest, what they learn and keep too."""

    inner: jh.Head = jh.subheads()
    log_temperature: jax.Array = jh.learned(lambda head, key: jnp.full((1,), 0.25))

    @property
    def logits_dimension(self):
        return self.inner.logits_dimension

    @property
    def label_spec(self):
        return self.inner.label_spec

    def _cooled(self, logits):
        return logits * jnp.expand_dims(jnp.exp(-self.log_temperature), tuple(range(logits.ndim - 1)))

    def losses(self, labels, logits):
        return self.inner.losses(labels, self._cooled(logits))

    def outputs(self, logits):
        return self.inner.outputs(self._cooled(logits))

    def observe(self, labels, logits):
        return self.inner.observe(labels, self._cooled(logits))

    def summarize(self, seen):
        return self.inner.summarize(seen)

    def advance(self, labels, logits, weights, psum):
        return {"inner": self.inner.advance(labels, self._cooled(logits), weights, psum)}


def exponential(logits):
    """A link that pickles; `jnp.exp` does not."""
    return jnp.exp(logits)


def hinge_per_element(labels, logits):
    """A loss function of the user's own."""
    return jnp.maximum(0.0, 1.0 - (2.0 * labels - 1.0) * logits)


def sigmoid(z):
    return np.exp(-np.logaddexp(0.0, -z))


def cross_entropy(labels, logits, params):
    return np.logaddexp(0.0, logits) - labels * logits


def softmax_cross_entropy(labels, logits, params):
    return np.logaddexp.reduce(logits, -1, keepdims=True) - np.take_along_axis(logits, labels, -1)


def softplus(z):
    return np.logaddexp(0.0, z)


def focal_losses(labels, logits, params):
    """The options of "binary_focal": smoothing 0.1, class weights (0.5, 2), gamma 2, alpha 0.25."""
    y, p = 0.9 * labels + 0.05, sigmoid(logits)
    positive, negative = 2 * 0.25 * (1 - p) ** 2 * softplus(-logits), 0.5 * 0.75 * p**2 * softplus(logits)
    return y * positive + (1 - y) * negative


def mixed_losses(labels, logits, params):
    """The options of "multi_class_mixed": smoothing 0.2, class weights (1, 3, 0.5), shares, a z-loss of 0.01."""
    z = logits + np.log([0.2, 0.3, 0.5])
    total = np.logaddexp.reduce(z, -1, keepdims=True)
    shares = (0.8 * labels + 0.2 / 3) * np.array([1, 3, 0.5])
    return (shares * (total - z)).sum(-1, keepdims=True) + 0.01 * total**2


def adjusted_losses(labels, logits, params):
    counts = np.asarray(params["class_counts"], np.float64).sum(-1)
    return softmax_cross_entropy(labels, logits + np.log(counts / counts.sum()), None)


def summed_losses(labels, logits, params):
    """The options of "multi_label_sum": the weights of positives (1, 2, 4), shares 0.5, 0.2, 0.1."""
    z = logits + np.log([1, 0.2 / 0.8, 0.1 / 0.9])
    return (np.array([1, 2, 4]) * labels * softplus(-z) + (1 - labels) * softplus(z)).sum(-1, keepdims=True)


def decision_metrics(labels, logits, weights, thresholds):
    """Accuracy, precision and recall over all entries, where a class is predicted above its threshold."""
    y, w = np.asarray(labels, np.float64), np.broadcast_to(weights, logits.shape)
    found = logits > np.log(thresholds) - np.log1p(-np.asarray(thresholds))
    with np.errstate(invalid="ignore"):
        return {
            "accuracy": (w * np.where(found, y, 1 - y)).sum() / w.sum(),
            "precision": (w * y * found).sum() / (w * found).sum(),
            "recall": (w * y * found).sum() / (w * y).sum(),
        }


def ordinal_losses(labels, logits, params):
    edges = np.concatenate([[-np.inf], np.asarray(params["cuts"], np.float64), [np.inf]])
    high, low = edges[labels + 1] - logits, edges[labels] - logits
    # F(high) - F(low) is F(-low) - F(-high): taken on the side where F is small, nothing cancels.
    high, low = np.where(low > 0, -low, high), np.where(low > 0, -high, low)
    log_high, log_low = -np.logaddexp(0.0, -high), -np.logaddexp(0.0, -low)
    return -log_high - np.log1p(-np.exp(log_low - log_high))


def prior_losses(labels, logits, params):
    positive, total = np.asarray(params["counts"], np.float64).sum(-1)
    return cross_entropy(labels, logits + np.log(positive / (total - positive)), None)


def nested_losses(labels, logits, params):
    z = logits * np.exp(-np.asarray(params["log_temperature"], np.float64))
    return prior_losses(labels, z, params["inner"])


def mean(values, weights):
    weights = np.broadcast_to(weights, np.broadcast_shapes(np.shape(values), np.shape(weights)))
    return float((values * weights).sum() / weights.sum())


MEAN, SCALE = np.array([100.0, -3.0]), np.array([20.0, 0.5])


def regression_metrics(link):
    def metrics(labels, logits, weights, params):
        return {"prediction/mean": mean(link(logits), weights), "label/mean": mean(labels, weights)}

    return metrics


def binary_metrics(labels, logits, weights, params):
    """By hand: the area is that without bins (pairs won, ties half), so it holds within what bins leave."""
    y, z = (np.asarray(x, np.float64).ravel() for x in (labels, logits))
    w = np.broadcast_to(weights, logits.shape).ravel()
    positive, negative, decided = w * y, w * (1 - y), z > 0
    tp, fp, fn, tn = (x.sum() for x in (positive[decided], negative[decided], positive[~decided], negative[~decided]))
    _, rank = np.unique(z, return_inverse=True)
    by_score = np.bincount(rank, negative)
    beaten = (np.cumsum(by_score) - by_score / 2)[rank]
    rate = positive.sum() / w.sum()
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "accuracy": (tp + tn) / w.sum(),
            "precision": tp / (tp + fp),
            "recall": tp / (tp + fn),
            "prediction/mean": mean(sigmoid(z), w),
            "label/mean": rate,
            "accuracy_baseline": max(rate, 1 - rate),
            "auc": positive @ beaten / (positive.sum() * negative.sum()),
        }


def multi_class_metrics(labels, logits, weights, params):
    return {"accuracy": mean(logits.argmax(-1, keepdims=True) == labels, weights)}


def multi_label_losses(labels, logits, params):
    return cross_entropy(labels, logits, params).mean(-1, keepdims=True)


def multi_label_metrics(labels, logits, weights, params):
    """All entries as examples of one histogram; class 1 by itself."""
    every = binary_metrics(labels, logits, weights, params)
    of_one = binary_metrics(labels[..., 1:2], logits[..., 1:2], weights, params)
    out = {"auc": every["auc"], "auc/class1": of_one["auc"], "probability_mean/class1": of_one["prediction/mean"]}
    # Positive is p > 0.5, z > 0.
    return out | {f"{key}/positive_threshold_0.5": every[key] for key in ("accuracy", "precision", "recall")}


def poisson_losses(labels, logits, params):
    y = np.maximum(labels, 2.0)
    stirling = np.where(labels > 1, labels * np.log(y) - labels + 0.5 * np.log(2 * np.pi * y), 0)
    return np.exp(logits) - labels * logits + stirling


def ordinal_metrics(labels, logits, weights, params):
    ids = (logits > np.asarray(params["cuts"], np.float64)).sum(-1, keepdims=True)
    return {
        "accuracy": mean(ids == labels, weights),
        "mean_absolute_error": mean(np.abs(ids - labels), weights),
    }


def floats(dimension):
    return lambda rng, lead: rng.normal(size=(*lead, dimension)).astype(np.float32)


def bits(rng, lead):
    return rng.integers(0, 2, (*lead, 1)).astype(np.int32)


def soft(rng, lead):
    return np.round(rng.random((*lead, 1)) * 8).astype(np.float32) / 8


def counts(rng, lead):
    return rng.poisson(2.0, (*lead, 2)).astype(np.float32)


def multi_hot(n):
    return lambda rng, lead: rng.integers(0, 2, (*lead, n)).astype(np.int32)


def ids(n):
    return lambda rng, lead: rng.integers(0, n, (*lead, 1)).astype(np.int32)


def shares(n):
    def draw(rng, lead):
        drawn = rng.exponential(size=(*lead, n))
        return (drawn / drawn.sum(-1, keepdims=True)).astype(np.float32)

    return draw


def times(rng, lead):
    return {
        "time": rng.exponential(size=(*lead, 1)).astype(np.float32),
        "event": rng.integers(0, 2, (*lead, 1)).astype(bool),
    }


def errors_of(surrogate, z):
    """What stands for a missed positive and for an alarm, and what they are at least where there is one."""
    if surrogate == "hinge":
        return np.maximum(0, 1 - z), np.maximum(0, 1 + z), 1.0
    return np.logaddexp(0, -z), np.logaddexp(0, z), np.log(2)


def global_losses(objective, target, surrogate, priors=None):
    """The table of formulas of Eban et al., entry by entry, then the mean over labels (and anchors)."""

    def losses(y, z, params):
        m, t = np.asarray(params["lagrange_multipliers"], np.float64), np.asarray(target, np.float64)
        counts = np.asarray(params.get("label_counts", np.ones((2, 1, 2))), np.float64).sum(-1)
        pi = counts[0] / counts[1] if priors is None else np.asarray(priors)
        y = np.asarray(y, np.float64)
        if objective == "precision_recall_auc":
            y, z, pi = y[..., None], z[..., None] + np.asarray(params["anchor_biases"], np.float64), pi[:, None]
        missed, alarm, c = errors_of(surrogate, z)
        missed, alarm = y * missed, (1 - y) * alarm
        if objective in ("precision_at_recall", "fpr_at_tpr"):
            values = m * missed + alarm + m * pi * (t - 1) * c
        elif objective == "tpr_at_fpr":
            values = missed + m * alarm - m * t * (1 - pi) * c
        else:
            values = (1 + m * (1 - t)) * missed + m * t * alarm - m * (1 - t) * pi * c
        return values.mean(tuple(range(1, values.ndim)))[:, None]

    return losses


def at_best(objective, target, y, z, w):
    """The best of what is optimized among all thresholds that hold the target, by trying every one."""
    p, n, found = (w * y).sum(), (w * (1 - y)).sum(), []
    for threshold in (*np.unique(z), -np.inf):
        tp, fp = (w * y)[z > threshold].sum(), (w * (1 - y))[z > threshold].sum()
        near = 1e-9 * (p + n)
        if objective in ("precision_at_recall", "fpr_at_tpr") and tp >= target * p - near:
            found.append((tp / (tp + fp) if tp + fp else 0) if objective == "precision_at_recall" else fp / n)
        elif objective == "recall_at_precision" and tp >= target * (tp + fp) - near:
            found.append(tp / p)
        elif objective == "tpr_at_fpr" and fp <= target * n + near:
            found.append(tp / p)
    best = min(found) if objective == "fpr_at_tpr" else max(found)
    return best if p > 0 and (n > 0 or objective in ("precision_at_recall", "recall_at_precision")) else np.nan


def global_metrics(objective, target, surrogate, priors, base_metrics, watched=None):
    """What is told of a rate and its constraint; with `watched`, the label that has metrics of its own."""
    losses = global_losses(objective, target, surrogate, priors)

    def metrics(y, z, w, params):
        m = np.asarray(params["lagrange_multipliers"], np.float64)
        out = {**base_metrics(y, z, w, params), "lagrangian": mean(losses(y, z, params), w)}
        y, w, n = np.asarray(y, np.float64), np.broadcast_to(w, y.shape), y.shape[-1]
        targets = np.broadcast_to(np.asarray(target, np.float64), m.shape).reshape(n, -1)
        if objective != "precision_recall_auc":
            stem = f"{objective}_{targets[watched or 0, 0]:g}"
            stem = stem if watched is None else f"{stem}/class{watched}"
            out[stem] = at_best(objective, targets[watched or 0, 0], *(x[:, watched or 0] for x in (y, z, w)))
        sums, p, q = [], (w * y).sum(0)[:, None], (w * (1 - y)).sum(0)[:, None]
        biases = np.asarray(params.get("anchor_biases", np.zeros((n, 1))), np.float64)
        decided = z[..., None] + biases
        positive, negative = (w * y)[..., None], (w * (1 - y))[..., None]
        missed, alarm, c = errors_of(surrogate, decided)
        for a, b in ((missed / c, alarm / c), (decided <= 0, decided > 0)):
            fn, fp = (positive * a).sum(0), (negative * b).sum(0)
            if objective in ("precision_at_recall", "fpr_at_tpr"):
                violation = targets - (p - fn) / p
            elif objective == "tpr_at_fpr":
                violation = fp / q - targets
            else:
                violation = (targets * fp - (1 - targets) * (p - fn)) / np.where(p > 0, p, np.nan)
            there = violation[~np.isnan(violation)]
            sums.append((fn, fp, there.max() if there.size else np.nan))
        (fn, fp, bound), (_, _, violation) = sums
        least = fp if objective in ("precision_at_recall", "fpr_at_tpr") else fn
        ones = np.ones_like(fn)
        return out | {
            "objective": c * least.sum() / (w.sum(0)[:, None] * ones).sum(),
            "constraint_violation": violation,
            "constraint_violation_surrogate": bound,
            "multiplier/mean": m.mean() if w.sum() else np.nan,
            "multiplier/max": m.max() if w.sum() else np.nan,
            "recall_lower_bound": (p - fn).sum() / (p * ones).sum(),
            "false_positive_rate_upper_bound": fp.sum() / (q * ones).sum(),
        }

    return metrics


class AllInTheFirst(jh.Slices):
    """Two groups that need no features."""

    def ids(self, features, lead, live, check):
        return np.zeros((*lead, 1), np.int32)

    def __repr__(self):
        return "ALL_IN_THE_FIRST"


ALL_IN_THE_FIRST = AllInTheFirst("", 2)


def group_losses(y, z, params):
    """The cross-entropy, and the constraint that as many of a group be taken for positive as of all, less 0.05."""
    m = np.asarray(params["group_lagrange_multipliers"], np.float64)
    total, support, *each = np.asarray(params["group_counts"], np.float64).sum(-1)[0]
    inside, each = np.array([1.0, 0.0]), np.array(each)
    terms = sigmoid(-z) * (inside - each / support) - 0.05 * each / total
    return cross_entropy(y, z, params) + (m * terms).mean(-1, keepdims=True)


def group_metrics(y, z, w, params):
    m = np.asarray(params["group_lagrange_multipliers"], np.float64)
    # What is all there is has nothing to be compared with, and in the second there is nobody.
    undefined = dict.fromkeys(("group_violation", "group_violation_surrogate", "group_violations"), np.nan)
    largest = m.max() if w.sum() else np.nan
    own = {"lagrangian": mean(group_losses(y, z, params), w), "group_multiplier/max": largest, **undefined}
    return {**binary_metrics(y, z, w, params), **own}


def pair_loss(y, z, w):
    """The weighted mean of `ln(1 + exp(z_j - z_i))` over pairs of a positive i and a negative j."""
    positive, negative = w * y, w * (1 - np.asarray(y, np.float64))
    rows = sum((positive[i] * negative.T[0] * np.logaddexp(0, z.T[0] - z[i])).sum() for i in range(len(z)) if y[i] > 0)
    total = positive.sum() * negative.sum()
    return float(rows / total) if total else 0.0


def global_entry(objective, target, labels, base, surrogate="xent", priors=None, watched=None, **options):
    head = jh.GlobalObjectiveHead(base, objective, target, surrogate=surrogate, label_priors=priors, **options)
    several = base.logits_dimension > 1
    losses, metrics = (multi_label_losses, multi_label_metrics) if several else (cross_entropy, binary_metrics)
    metrics = metrics if watched is not None or not several else lambda *a: {"auc": binary_metrics(*a)["auc"]}
    if objective == "precision_recall_auc":
        low, high = head.precision_range
        target = np.linspace(low, high, head.num_anchors + 2)[1:-1]
    return Entry(
        objective,
        head,
        labels,
        global_losses(objective, target, surrogate, priors),
        global_metrics(objective, target, surrogate, priors, metrics, watched),
        illegal=2,
        averaged=losses,
        running=priors is None,
        slow=True,
    )


ZOO = (
    Entry(
        "regression",
        jh.RegressionHead(),
        floats(1),
        lambda y, z, p: (z - y) ** 2,
        regression_metrics(lambda z: z),
        illegal=np.nan,
        closed=True,
    ),
    Entry(
        "regression_3_exp",
        jh.RegressionHead(3, inverse_link_fn=exponential, loss_reduction="mean", name="r"),
        floats(3),
        lambda y, z, p: (z - y) ** 2,
        regression_metrics(np.exp),
        illegal=np.nan,
        closed=True,
    ),
    Entry(
        "regression_scaled",
        jh.RegressionHead(2, label_mean=(100.0, -3.0), label_scale=(20.0, 0.5)),
        lambda rng, lead: (MEAN + SCALE * rng.normal(size=(*lead, 2))).astype(np.float32),
        lambda y, z, p: (z - (y - MEAN) / SCALE) ** 2,
        regression_metrics(lambda z: MEAN + SCALE * z),
        illegal=np.nan,
        closed=True,
        slow=True,
    ),
    Entry(
        "regression_log_cosh",
        jh.RegressionHead(objective="log_cosh"),
        floats(1),
        lambda y, z, p: np.logaddexp(z - y, y - z) - np.log(2),
        regression_metrics(lambda z: z),
        illegal=np.nan,
        slow=True,
    ),
    Entry(
        "binary",
        jh.BinaryClassHead(thresholds=(0.3,)),
        bits,
        cross_entropy,
        binary_metrics,
        illegal=2,
        closed=True,
    ),
    Entry(
        "binary_soft_grid",
        jh.BinaryClassHead(bins=jh.ThresholdGrid(200), loss_reduction="sum"),
        soft,
        cross_entropy,
        lambda *a: {k: v for k, v in binary_metrics(*a).items() if k != "auc"},
        illegal=-0.5,
        closed=True,
    ),
    Entry(
        "binary_hinge",
        jh.BinaryClassHead(loss_fn=hinge_per_element, loss_reduction="sum_by_nonzero_weights"),
        bits,
        lambda y, z, p: np.maximum(0, 1 - (2 * y - 1) * z),
        binary_metrics,
        illegal=2,
        slow=True,  # a loss of the user's own: its quick tests are in test_inputs.py
    ),
    Entry(
        "multi_class",
        jh.MultiClassHead(5),
        ids(5),
        softmax_cross_entropy,
        multi_class_metrics,
        illegal=-1,
        closed=True,
    ),
    Entry(
        "binary_focal",
        jh.BinaryClassHead(
            label_smoothing=0.1, class_weights=(0.5, 2), focal_gamma=2.0, focal_alpha=0.25, decision_threshold=0.3
        ),
        soft,
        focal_losses,
        lambda y, z, w, p: binary_metrics(y, z, w, p) | decision_metrics(y, z, w, [0.3]),
        illegal=-0.5,
    ),
    Entry(
        "multi_class_mixed",
        jh.MultiClassHead(
            3,
            label_kind="distributions",
            label_smoothing=0.2,
            class_weights=(1, 3, 0.5),
            logit_adjustment=(0.2, 0.3, 0.5),
            z_loss=0.01,
            loss_reduction="mean",
        ),
        shares(3),
        mixed_losses,
        lambda y, z, w, p: {"accuracy": mean(np.take_along_axis(y, z.argmax(-1)[..., None], -1), w)},
        illegal=2,
        closed=True,
    ),
    Entry(
        "multi_class_adjusted",
        jh.MultiClassHead(3, logit_adjustment="running"),
        ids(3),
        adjusted_losses,
        multi_class_metrics,
        illegal=3,
        counted=lambda y, w: (w * np.eye(3)[y[..., 0]]).sum(0),
        running=True,
        closed=True,
        slow=True,  # the quick tests of what runs are those of "nested"
    ),
    Entry(
        "multi_label_sum",
        jh.MultiLabelHead(
            3,
            reduce_classes="sum",
            pos_weight=(1, 2, 4),
            logit_adjustment=(0.5, 0.2, 0.1),
            decision_threshold=(0.5, 0.3, 0.7),
        ),
        multi_hot(3),
        summed_losses,
        lambda y, z, w, p: {"auc": binary_metrics(y, z, w, p)["auc"]} | decision_metrics(y, z, w, [0.5, 0.3, 0.7]),
        illegal=2,
        closed=True,
        slow=True,  # its options are those of "binary_focal"; test_class_options.py holds what is its own
    ),
    Entry("ordinal", OrdinalHead(4), ids(4), ordinal_losses, ordinal_metrics, illegal=4),
    # Among the quick tests it is the head inside "nested".
    Entry("running_prior", PriorCorrectedHead(), bits, prior_losses, illegal=2, running=True, slow=True),
    Entry(
        "nested",
        TemperatureHead(PriorCorrectedHead(name="inner"), name="t"),
        bits,
        nested_losses,
        illegal=2,
        running=True,
    ),
    Entry(
        "survival",
        SurvivalHead(loss_reduction="mean"),
        times,
        lambda y, z, p: y["time"] * np.exp(z) - y["event"] * z,
        lambda y, z, w, p: {"event_rate": mean(y["event"], w)},
        count=lambda y: y["event"].astype(np.float64),
    ),
    Entry(
        "poisson",
        jh.PoissonRegressionHead(2),
        counts,
        poisson_losses,
        regression_metrics(np.exp),
        illegal=-1,
        closed=True,
    ),
    Entry(
        "logistic",
        jh.LogisticRegressionHead(loss_reduction="sum_by_nonzero_weights"),
        soft,
        cross_entropy,
        regression_metrics(sigmoid),
        illegal=1.5,
        closed=True,
    ),
    Entry(
        "multi_label",
        jh.MultiLabelHead(3, thresholds=(0.5,), classes_for_class_based_metrics=(1,)),
        multi_hot(3),
        multi_label_losses,
        multi_label_metrics,
        illegal=2,
        closed=True,
    ),
)


def _named(name: str, entry_name: str, **changes: Any) -> Entry:
    """The entry of a head in the zoo, under a name of its own."""
    entry = next(entry for entry in ZOO if entry.name == entry_name)
    return dataclasses.replace(entry, head=dataclasses.replace(entry.head, name=name, **changes))


ZOO += (
    MultiEntry.of(
        "multi_head",
        (
            _named("late", "binary"),
            _named("stars", "ordinal", loss_reduction="mean"),
            _named("minutes", "poisson", loss_reduction="sum_by_nonzero_weights"),
        ),
        (1.0, 2.0, 0.25),
    ),
    # Without a mask in the features, at any leading shape; masks have tests of their own.
    dataclasses.replace(
        _named("s", "multi_class"),
        name="sequential",
        head=jh.SequentialHeadWrapper(jh.MultiClassHead(5, name="s"), None),
    ),
)

ZOO += (
    global_entry("precision_at_recall", 0.83, bits, jh.BinaryClassHead()),
    global_entry(
        "recall_at_precision",
        (0.6, 0.7, 0.8),
        multi_hot(3),
        jh.MultiLabelHead(3, thresholds=(0.5,), classes_for_class_based_metrics=(1,), name="g", loss_reduction="mean"),
        priors=(0.5, 0.4, 0.6),
        watched=1,
    ),
    global_entry("tpr_at_fpr", 0.25, soft, jh.BinaryClassHead(loss_reduction="sum"), "hinge", priors=(0.3,)),
    global_entry("fpr_at_tpr", 0.8, bits, jh.BinaryClassHead(loss_reduction="mean"), priors=(0.5,)),
    global_entry(
        "precision_recall_auc",
        None,
        multi_hot(2),
        jh.MultiLabelHead(2),
        num_anchors=3,
        precision_range=(0.4, 0.9),
    ),
    Entry(
        "roc_auc",
        jh.GlobalObjectiveHead(jh.BinaryClassHead(), "roc_auc"),
        bits,
        lambda y, z, p: np.zeros((len(z), 1)),
        binary_metrics,
        illegal=2,
        averaged=cross_entropy,
        whole=pair_loss,
        slow=True,
    ),
    # Laws give no features: all rows are in the first of two groups. Groups as they come: test_group_constraints.py.
    Entry(
        "error_rate",
        jh.GlobalObjectiveHead(jh.BinaryClassHead(slices=ALL_IN_THE_FIRST), "error_rate", group_rate="positive_rate"),
        bits,
        group_losses,
        group_metrics,
        illegal=2,
        averaged=cross_entropy,
        multipliers={"group_lagrange_multipliers": jnp.array([[0.5, 1.5]])},
        counted=lambda y, w: w.sum() * np.array([1.0, 1, 1, 0]),  # all, of which the rate is, and in each group
        running=True,
        slow=True,
    ),
)


# The heads on which the laws of the engine are proved in full, one for each way through the engine: weights of single
# logits (`regression_3_exp`); a histogram of scores (`binary`); parameters, running state and a head inside
# (`nested`); a dict of labels, and counts of its own (`survival`); several heads; sequences of classes. Among the slow
# tests: rates of several labels, pairs of rows, groups. A head that goes a way of its own is added here; others run
# `test_laws.py`.
ENGINE = ("regression_3_exp", "binary", "nested", "survival", "multi_head", "sequential")
ENGINE += ("recall_at_precision", "roc_auc", "error_rate")


# Ids of tests are split at "-", and a test belongs to the head that its id names: see `programs.group_of`.
assert not any("-" in entry.name for entry in ZOO)


def marked(entries: Any = ZOO, quick: Any = None) -> list[Any]:
    """Entries as tests are parametrized with them: with `quick`, all others are slow."""
    slow = [pytest.mark.slow]
    return [
        pytest.param(entry, id=entry.name, marks=slow if entry.slow or (quick and entry.name not in quick) else [])
        for entry in entries
    ]


# Heads whose rows look at each other, or whose elements have an inside. `jaxheads.testing.check_head` runs the laws on
# them: `tests/test_testing.py`.


@dataclasses.dataclass(frozen=True)
class Shaped:
    """A head of another shape than rows of logits.

    Attributes:
        head: the instance.
        oracle: `(labels, logits[, weights]) -> losses`, or `(losses, counts)`, in float64.
        labels: `(rng, lead) -> labels`; None to draw them from the label spec.
    """

    head: jh.Head
    oracle: Callable[..., Any]
    labels: Callable[[np.random.Generator, tuple[int, ...]], Any] | None = None


def across(rows, x):
    """`x [..., 1]` of the rows of every device, on the last axis."""
    every = rows.devices.all(x)
    return jnp.reshape(every, (1,) * (x.ndim - 1) + every.shape[:1])


class CoxHead(jh.Head):
    """Partial likelihood (Cox 1972, ties as Breslow): of those still at risk, who has the event."""

    logits_dimension = 1
    label_spec = MappingProxyType({"time": jh.LabelSpec(1, "float", low=0), "event": jh.LabelSpec(1, "bool")})
    coupling = "batch"

    def losses(self, labels, logits, rows):
        times, scores, weights = (across(rows, x) for x in (labels["time"], logits, rows.weights))
        at_risk = jnp.where(times >= labels["time"], weights, 0.0)
        at_risk = jnp.where(rows.weights > 0, at_risk, 1.0)  # of a hidden row all, for a logarithm that is finite
        log_risk = jax.nn.logsumexp(scores, axis=-1, b=at_risk, keepdims=True)
        events = labels["event"].astype(jnp.float32)
        return jh.Term(events * (log_risk - logits), events)


def cox_losses(labels, logits, weights):
    time, event, risks = labels["time"], np.float64(labels["event"]), weights * np.exp(logits)
    at_risk = np.array([[risks[time[:, 0] >= t[0]].sum()] for t in time])
    return event * (np.log(at_risk) - logits), event


class InfoNceHead(jh.Head):
    """In-batch contrastive loss of two towers (van den Oord et al. 2018): the key of the same row among all keys."""

    size: int = 3
    label_spec = MappingProxyType({})
    coupling = "batch"

    @property
    def logits_dimension(self):
        return 2 * self.size

    @property
    def logits_spec(self):
        return {"query": self.size, "key": self.size}

    def losses(self, labels, logits, rows):
        query, key = logits["query"], logits["key"]
        weights = jnp.where(rows.weights > 0, across(rows, rows.weights), 1.0)
        scores = query @ rows.devices.all(key).T
        return jax.nn.logsumexp(scores, axis=-1, b=weights, keepdims=True) - jnp.sum(query * key, -1, keepdims=True)


def info_nce_losses(labels, logits, weights):
    scores = logits["query"] @ logits["key"].T
    return np.log((np.exp(scores) * weights.T).sum(-1, keepdims=True)) - np.diag(scores)[:, None]


class ListwiseHead(jh.Head):
    """Softmax over the items of a list (ListNet, Cao et al. 2007); `where [..., items]` says which items are there."""

    items: int = 4
    coupling = "row"
    per_logit_where = True

    @property
    def logits_dimension(self):
        return self.items

    @property
    def label_spec(self):
        return jh.LabelSpec(self.items, "float", low=0)

    def losses(self, labels, logits, rows):
        there = rows.exists | ~jnp.any(rows.exists, -1, keepdims=True)
        normalizer = jax.nn.logsumexp(logits, axis=-1, where=jnp.broadcast_to(there, logits.shape), keepdims=True)
        return jnp.sum(labels * (normalizer - logits), axis=-1, keepdims=True)


def listwise_losses(labels, logits):
    return (labels * (np.log(np.exp(logits).sum(-1, keepdims=True)) - logits)).sum(-1, keepdims=True)


class CtcHead(jh.Head):
    """Connectionist temporal classification (Graves et al. 2006), by optax: `[..., T, V]` logits, `[..., L]` labels."""

    steps: int = 5
    symbols: int = 3  # the blank, 0, included; labels are filled up with it
    coupling = "row"

    logits_dimension = 1

    @property
    def logits_spec(self):
        return (self.steps, self.symbols)

    @property
    def label_spec(self):
        return jh.LabelSpec(2, "int", 0, self.symbols - 1)

    def losses(self, labels, logits):
        logits, ids = logits.reshape(-1, *self.logits_spec), labels.reshape(-1, 2)
        found = optax.ctc_loss(logits, jnp.zeros(logits.shape[:2]), ids, (ids == 0).astype(jnp.float32))
        return found.reshape(*labels.shape[:-1], 1)


def ctc_labels(rng, lead):
    """One or two symbols, then blanks."""
    ids = rng.integers(1, 3, (*lead, 2))
    ids[..., 1] *= rng.integers(0, 2, lead)
    return ids.astype(np.int32)


def ctc_losses(labels, logits):
    """The probability of all paths of blanks and symbols that read as the label, path by path."""
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    steps, symbols = p.shape[1:]
    paths = list(itertools.product(range(symbols), repeat=steps))

    def read(path):
        return tuple(symbol for symbol, _ in itertools.groupby(path) if symbol)

    def loss(row, label):
        target = tuple(int(symbol) for symbol in label if symbol)
        return -np.log(sum(np.prod([row[t, s] for t, s in enumerate(path)]) for path in paths if read(path) == target))

    return np.array([[loss(*pair)] for pair in zip(p, labels, strict=True)])


class RetrievalHead(jh.Head):
    """Softmax over items by two towers, `hidden @ kernel`, two items at a time: the product is never whole."""

    items: int = 6
    coupling = "row"
    takes_linear = True

    @property
    def logits_dimension(self):
        return self.items

    @property
    def label_spec(self):
        return jh.LabelSpec(1, "int", 0, self.items - 1)

    def losses(self, labels, logits):
        if not isinstance(logits, jh.LinearLogits):
            return jax.nn.logsumexp(logits, -1, keepdims=True) - jnp.take_along_axis(logits, labels, -1)
        normalizer, own = jnp.full(labels.shape, -jnp.inf), jnp.zeros(labels.shape)
        for start in range(0, self.items, 2):
            block, inside = logits.columns(start, start + 2).multiply(), labels // 2 == start // 2
            normalizer = jnp.logaddexp(normalizer, jax.nn.logsumexp(block, -1, keepdims=True))
            own += jnp.where(inside, jnp.take_along_axis(block, labels % 2, -1), 0.0)
        return normalizer - own


SHAPED = {
    "cox": Shaped(CoxHead(), cox_losses, times),
    "info_nce": Shaped(InfoNceHead(), info_nce_losses),
    "listwise": Shaped(ListwiseHead(), listwise_losses),
    "ctc": Shaped(CtcHead(), ctc_losses, ctc_labels),
    "retrieval": Shaped(RetrievalHead(), lambda y, z: softmax_cross_entropy(y, z, None)),
}

"""Losses of a whole data set, not of single rows: rates such as precision at recall, and areas under curves."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.compose import _rates, group_constraint
from jaxheads.compose._abstract import AbstractWrapperHead
from jaxheads.compose.group_constraint import GroupConstraint, leading
from jaxheads.contract import AVERAGE_LOSS, Rows, Term, learned, running, subheads
from jaxheads.head import Head
from jaxheads.heads import BinaryClassHead, MultiLabelHead
from jaxheads.losses import global_objectives as formulas
from jaxheads.metrics import Mean, Observation, ScoresView
from jaxheads.metrics.base import SCORES, join_names
from jaxheads.metrics.mean import Sums
from jaxheads.metrics.state import metric_names
from jaxheads.numerics import brief, fields, hooks, inputs, masking, pairs

PRECISION_RECALL_AUC, ROC_AUC, ERROR_RATE = "precision_recall_auc", "roc_auc", "error_rate"
CONSTRAINED = tuple(_rates.ACHIEVED)
OBJECTIVES = (*CONSTRAINED, PRECISION_RECALL_AUC, ROC_AUC, ERROR_RATE)
CONSTRAINTS, NORMALIZATIONS = ("surrogate", "zero_one"), ("pairs", "batch")
LAGRANGIAN, RATES, GROUPS = "objective/lagrangian", "objective/rates", "objective/groups"


class GlobalObjectiveHead(AbstractWrapperHead):
    """A classifier trained for a rate of the whole data set, for example the best precision at a recall of 0.98.

    It wraps a `BinaryClassHead` or a `MultiLabelHead`, which determines labels, weights, reduction and names. An
    objective with a constraint has a multiplier for each label, or for each label and anchor. The multipliers are
    learned together with the network, by ascent: the optimizer must be `jh.training.primal_dual(optimizer)`, and every
    other optimizer is refused.

    **Domain**: the domain of the base head, soft labels included. Masks and weights apply to whole rows.

    **Link**: the link of the base head. Objectives of rates decide at z > 0, and learn to place the logits around this
    threshold. So their probabilities are not calibrated.

    **loss** = the mean over labels of a Lagrangian, with `l+ = softplus(-z)`, `l- = softplus(z)`, c = ln 2 (`"hinge"`:
    `max(0, 1 - z)`, `max(0, 1 + z)`, 1), the share pi of positives, the target t and the multiplier m:

    | objective | loss of an entry | it minimizes, such that |
    | --- | --- | --- |
    | `precision_at_recall`, `fpr_at_tpr` | `m y l+ + (1 - y) l- - m (1 - t) pi c` | FP, TP is at least t P |
    | `recall_at_precision` | `(1 + m (1 - t)) y l+ + m t (1 - y) l- - m (1 - t) pi c` | FN, precision is at least t |
    | `tpr_at_fpr` | `y l+ + m (1 - y) l- - m t (1 - pi) c` | FN, FP is at most t N |
    | `precision_recall_auc` | the mean over anchors k of recall at precision t_k, at z + b_k | each m_k, b_k learned |
    | `roc_auc` | `l+(z_i - z_j)` of pairs, i positive and j negative | no constraint, no multiplier |
    | `error_rate` | `y l+ + (1 - y) l-` | FP + FN, under `group_rate` alone |

    **Groups**: `group_rate` limits how much worse off a group of the base head's `slices` may be than all rows
    together. The `"true_positive_rate"` or the `"positive_rate"` of a group must be at least the rate of all rows,
    less `group_tolerance`. Its `"false_positive_rate"` must be at most the rate of all rows, plus `group_tolerance`.
    (These are equal opportunity, demographic parity and predictive equality.) The loss of each entry gets one more
    term, the mean over groups g of `m_g (u e ([in g] - r_g) - tolerance q_g)`:

    * u says whether the rate counts the entry: y for true positives, 1 - y for false positives, 1 for all.
    * e is the error, softly: `sigmoid(-z)`, or `sigmoid(z)` for a false positive. With `constraint="zero_one"`, which
      is recommended here, the multipliers see z <= 0 (z > 0) instead.
    * q_g is the share of u in g among all rows, and r_g the share of u in g among u. Both are counted like the share of
      positives.

    So the multiplier of a group moves by its violation times q_g. `loss` reads the groups from `features` too. A row
    with the id -1 is in no group, but counts among all rows.

    Except for pairs, each loss is a function of one entry, and weights count in all its terms. So the losses are exact
    on any devices and in any micro-batches. A Lagrangian may be negative, and may rise during training: watch
    `average_loss` or the achieved rate. Pairs are different. On devices (`axis_name`) the logits of all devices are
    gathered. Micro-batches would separate pairs, and are refused (with a `normalizer=`, the pairs across parts are lost
    too). The loss of pairs is W/D times their mean loss over labels: W is the sum of weights, and D the divisor of the
    reduction. Under `"mean"` it is the mean loss itself. Time is quadratic in the batch, memory linear.

    The share of positives comes from all earlier training batches, over all devices; before the first batch it is 1 of
    2. It acts only on the gradient of the multipliers. A share of each batch alone would make the multipliers of rare
    positives jump.

    **Predictions**: the predictions of the base head; `operating_point`, the logit above which an entry is positive,
    `[..., n]` (with anchors: `-b_k`, `[..., n, anchors]`); `decisions`, int32 of that shape. `roc_auc` has the last two
    only if `operating_point=` is given.
    **Metrics**: the metrics of the base head, with its own `average_loss`. Objectives of rates add:

    * `objective`, the mean of the minimized cost, and `lagrangian`.
    * `constraint_violation`, decided by z > 0 (or z + b_k > 0), of the worst label or anchor: the excess of errors as a
      share of P, or of the negatives where FP is limited. `constraint_violation_surrogate` is the same by the losses,
      and at least as large.
    * `multiplier/mean`, `multiplier/max`.
    * `recall_lower_bound` and `false_positive_rate_upper_bound`, by the losses.
    * The achieved rate: for `precision_at_recall` with target 0.98 it is `precision_at_recall_0.98`, with `_threshold`
      and `_logit` like `jh.metrics.PrecisionAtRecall`. A `MultiLabelHead` has `precision_at_recall_0.98/CLASS` for the
      classes with metrics of their own.

    With `group_rate` there are `group_violation` (by z > 0) and `group_violation_surrogate` (softly), both of the worst
    group and label, `group_violations` `[groups]`, for each group of its worst label, and `group_multiplier/max`.
    `metrics.by_slice()` has the recall of each group (its false positive rate with `jh.metrics.Specificity`). It has no
    violation of a slice that is a group itself: there is nothing to compare the slice with.

    Args:
        base: a `BinaryClassHead` or a `MultiLabelHead` without a `loss_fn`.
        objective: one of the table.
        target: a number in (0, 1], for `tpr_at_fpr` in [0, 1); or one for each label. None for areas.
        surrogate: `"xent"` or `"hinge"`.
        constraint: `"surrogate"`, or `"zero_one"`: the multipliers see the rates themselves, the network their
            surrogates (a proxy Lagrangian). Surrogates are bounds: with them, a constraint is met with a margin.
        label_priors: the weighted share of positives, one number or one for each label; None to count it.
        initial_multiplier: the first value of the multipliers.
        num_anchors: how many anchors `precision_recall_auc` has.
        precision_range: two numbers in [0, 1], rising; the precisions of the anchors lie between them.
        normalize: for `roc_auc`. With `"pairs"` its loss is at least c (1 - AUC) for each label. With `"batch"` the sum
            over pairs is divided by the number of all pairs of rows, as in the original; it shrinks where one class is
            rare.
        group_rate: `"true_positive_rate"`, `"false_positive_rate"`, `"positive_rate"`; or None for no such constraint.
        group_tolerance: how much worse off a group may be.
        operating_point: the logit above which an entry is positive, or one for each label, by default 0. Find it on
            held-out data: `metrics.compute()["precision_at_recall_0.98_logit"]`.

    Raises:
        ValueError: a base head of another kind; an unknown objective; a target, prior or range with an illegal value,
            or with another number of values than labels; an option of another objective; `group_rate` without slices,
            or with areas; an optimizer that would descend on the multipliers; micro-batches of pairs; the errors of the
            base head.

    Source: Eban et al., "Scalable Learning of Non-Decomposable Objectives" (AISTATS 2017), and its `global_objectives`
    (TensorFlow 1); proxy Lagrangians and rates of groups by Cotter et al., ALT 2019 and JMLR 2019; equal opportunity by
    Hardt et al., NeurIPS 2016.

    >>> import jax.numpy as jnp
    >>> import jaxheads as jh
    >>> head = jh.GlobalObjectiveHead(jh.BinaryClassHead(), "precision_at_recall", 0.9, label_priors=0.5)
    >>> params = head.init(jax.random.key(0))
    >>> params
    {'lagrange_multipliers': Array([1.], dtype=float32)}
    >>> labels, logits = jnp.array([1, 1, 0, 0]), jnp.array([[2.0], [-0.5], [-1.0], [0.5]])
    >>> float(head.loss(labels=labels, logits=logits, params=params))  # the cross-entropy, less 0.1 * 0.5 * ln 2
    0.5624...
    >>> values = head.measure(labels=labels, logits=logits, params=params).compute()
    >>> print(*(f"{values[key]:.3f}" for key in ("average_loss", "constraint_violation", "precision_at_recall_0.9")))
    0.597 0.400 0.667
    """

    name: ClassVar[Any] = property(lambda self: self.base.name, doc="The name of the base head.")
    extra_metrics: ClassVar[Any] = property(lambda self: self.base.extra_metrics, doc="The base head's extra metrics.")
    weight_column: ClassVar[Any] = property(lambda self: self.base.weight_column, doc="The base head's weight column.")  # pyright: ignore[reportIncompatibleVariableOverride]  # no argument here

    base: Head = subheads()
    objective: str
    target: float | Sequence[float] | None = None
    surrogate: str = "xent"
    constraint: str = "surrogate"
    label_priors: float | Sequence[float] | None = None
    initial_multiplier: float = 1.0
    num_anchors: int = 20
    precision_range: Sequence[float] = (0.0, 1.0)
    normalize: str = "pairs"
    group_rate: str | None = None
    group_tolerance: float = 0.05
    operating_point: float | Sequence[float] | None = None
    lagrange_multipliers: Any = learned(
        lambda head, key: jnp.full(head._shape, head.initial_multiplier, jnp.float32) if head._is_constrained else None
    )
    anchor_biases: Any = learned(lambda head, key: jnp.zeros(head._shape, jnp.float32) if head._has_anchors else None)
    group_lagrange_multipliers: Any = learned(
        lambda head, key: None if head._groups is None else head._groups.first_multipliers()
    )
    label_counts: Any = running(lambda head: head._start_counts())
    group_counts: Any = running(lambda head: None if head._groups is None else head._groups.first_counts())

    @property
    def wrapped(self) -> Head:
        """The base head."""
        return self.base

    def parts(self) -> dict[str, Head]:
        """Returns no heads: the engine calls this head's own loss, and this head calls the base head."""
        return {}

    def validate(self) -> None:
        if not isinstance(self.base, (BinaryClassHead, MultiLabelHead)):
            raise ValueError(f"base must be a BinaryClassHead or a MultiLabelHead. Given {self.base!r}.")
        if self.base.loss_fn is not None:
            raise ValueError(
                f"base must have no loss_fn: this head has a loss of its own. Given {self.base!r}. Choose surrogate="
                f"{list(formulas.SCALE)}."
            )
        unread = (*self.base.option_names, "decision_threshold", "reduce_classes")
        defaults = {field.name: field.default for field in dataclasses.fields(self.base) if field.name in unread}
        if given := [name for name, default in defaults.items() if getattr(self.base, name) != default]:
            raise ValueError(
                f"base must have none of the options {given}, which would change nothing: this head has a loss and an "
                f"operating_point of its own. Given {self.base!r}."
            )
        for field, value, known in (
            ("objective", self.objective, OBJECTIVES),
            ("surrogate", self.surrogate, tuple(formulas.SCALE)),
            ("constraint", self.constraint, CONSTRAINTS),
            ("normalize", self.normalize, NORMALIZATIONS),
        ):
            if not brief.is_one_of(value, known):
                raise ValueError(f"{field} must be one of {known}. Given {value!r}.")
        self._check_options()
        self._check_targets()
        self._check_anchors()
        if not _is_finite(self.initial_multiplier) or self.initial_multiplier < 0:
            raise ValueError(f"initial_multiplier must be a number of at least 0. Given {self.initial_multiplier!r}.")
        if self.operating_point is not None:
            self._check_each("operating_point", self.operating_point, _is_finite, "a finite logit")
        self._check_groups()
        if self.base.extra_metrics:
            metric_names(fields.unbound(self))  # refuses names that clash

    def _check_options(self) -> None:
        """Refuses the options of other objectives, which would have no effect."""
        read = {
            "target": self.objective in CONSTRAINED,
            **dict.fromkeys(("num_anchors", "precision_range"), self._has_anchors),
            **dict.fromkeys(("label_priors", "initial_multiplier"), self._is_constrained),
            "constraint": self._is_constrained or self.group_rate is not None,
            "normalize": self.is_of_pairs,
            "group_rate": not (self.is_of_pairs or self._has_anchors),
        }
        values = fields.values_of(self)
        for field in dataclasses.fields(self):
            if not read.get(field.name, True) and (value := values[field.name]) != field.default:
                raise ValueError(f"{self.objective} reads no {field.name}. Given {value!r}. Leave it out.")

    def _check_targets(self) -> None:
        low_is_legal = self.objective == formulas.TPR_AT_FPR
        legal = "in [0, 1)" if low_is_legal else "in (0, 1]"
        if self.objective in CONSTRAINED:
            is_legal = (lambda t: 0 <= t < 1) if low_is_legal else (lambda t: 0 < t <= 1)
            self._check_each("target", self.target, is_legal, f"a number {legal}")
        if self.label_priors is not None:
            self._check_each("label_priors", self.label_priors, lambda p: 0 <= p <= 1, "a share in [0, 1]")

    def _check_groups(self) -> None:
        if self.group_rate is None:
            if self.objective == ERROR_RATE:
                raise ValueError(
                    "error_rate alone is the base head's own loss. Pass group_rate=, or use the base head. Given None."
                )
            if self.group_tolerance != 0.05:
                raise ValueError(f"group_tolerance is of group_rate, which is None. Given {self.group_tolerance!r}.")
            return
        if self.group_rate not in group_constraint.RATES:
            raise ValueError(f"group_rate must be one of {(*group_constraint.RATES,)}. Given {self.group_rate!r}.")
        if self.base.slices is None:
            raise ValueError(
                f'group_rate needs the groups: build the base head with slices=jh.Slices("origin", 3). Given '
                f"{self.base!r}."
            )
        if not _is_finite(self.group_tolerance) or not 0 <= self.group_tolerance < 1:
            raise ValueError(f"group_tolerance must be a number in [0, 1). Given {self.group_tolerance!r}.")

    def _check_anchors(self) -> None:
        n, ends = self.num_anchors, self.precision_range
        if not inputs.is_integer(n, 1):
            raise ValueError(f"num_anchors must be an integer of at least 1. Given {n!r}.")
        if (
            not (isinstance(ends, tuple) and len(ends) == 2 and all(map(_is_finite, ends)))
            or not 0 <= ends[0] < ends[1] <= 1
        ):
            raise ValueError(f"precision_range must be two numbers in [0, 1], rising. Given {ends!r}.")

    def _check_each(self, field: str, value: Any, is_legal: Callable[[Any], bool], what: str) -> None:
        """Refuses every value but one legal number, or a legal number for each label."""
        n = self.logits_dimension
        values = value if isinstance(value, tuple) else (value,)
        if not all(_is_finite(x) and is_legal(x) for x in values) or len(values) not in (1, n):
            raise ValueError(
                f"{field} of {self.objective} must be {what}" + (f", or {n} of them" if n > 1 else "") + f". Given "
                f"{value!r}."
            )

    @property
    def is_of_pairs(self) -> bool:
        """Whether the loss compares pairs of rows."""
        return self.objective == ROC_AUC

    @property
    def coupling(self) -> str:
        """The coupling: a pair joins any two rows."""
        return "batch" if self.is_of_pairs else "row"

    @property
    def signed(self) -> bool:
        """Whether the loss may be negative, as a Lagrangian may."""
        return not self.is_of_pairs

    @property
    def reads_slices(self) -> bool:
        """Whether the loss needs the groups."""
        return self.group_rate is not None

    @property
    def _is_constrained(self) -> bool:
        """Whether the objective has a constraint of its own."""
        return self.objective not in (ROC_AUC, ERROR_RATE)

    @property
    def _has_anchors(self) -> bool:
        return self.objective == PRECISION_RECALL_AUC

    @property
    def _shape(self) -> tuple[int, ...]:
        """The shape of the multipliers: one for each label, or for each label and anchor."""
        return (self.logits_dimension, self.num_anchors) if self._has_anchors else (self.logits_dimension,)

    @property
    def _problem(self) -> formulas.Problem:
        if not self._has_anchors:
            return formulas.problem(self.objective, self._repeat(self.target))
        low, high = self.precision_range
        anchors = np.linspace(low, high, self.num_anchors + 2)[1:-1]
        return formulas.problem(formulas.RECALL_AT_PRECISION, np.broadcast_to(anchors, self._shape))

    def _repeat(self, value: Any) -> np.ndarray:
        return np.broadcast_to(np.asarray(value, np.float64).reshape(-1), (self.logits_dimension,))

    def _start_counts(self) -> jax.Array | None:
        """Returns for each label the number of positives, then of all elements, before the first batch.

        They are compensated pairs `[2, labels, 2]`, for a float32 counter stops at 2^24.
        """
        if not self._is_constrained or self.label_priors is not None:
            return None
        first = np.broadcast_to(np.array([[1.0], [2.0]], np.float32), (2, self.logits_dimension))
        return jnp.stack([first, np.zeros_like(first)], axis=-1)

    def _share_positives(self) -> jax.Array:
        """Returns the share of positives for each label."""
        if self.label_counts is None:
            return jnp.asarray(self._repeat(self.label_priors), jnp.float32)
        positives, total = jnp.sum(self.label_counts, axis=-1)
        return positives / total

    @property
    def _groups(self) -> GroupConstraint | None:
        """The constraint on groups; None if there is none."""
        if self.group_rate is None:
            return None
        slices: Any = self.base.slices
        return GroupConstraint(
            self.group_rate, self.group_tolerance, self.logits_dimension, slices.n, self.constraint == "zero_one"
        )

    # Loss.

    def losses(self, labels: jax.Array, logits: jax.Array, rows: Rows | None = None) -> jax.Array:
        """Returns one loss for each example, `[..., 1]`: its Lagrangian, or its part in the loss of pairs of rows."""
        if not self.is_of_pairs:
            return self._compute_lagrangians(labels, logits, rows)
        if rows is None:
            ones = masking.ones_like(logits[..., :1])
            rows = Rows(ones > 0, ones)
        every = formulas.Rows(*(rows.devices.all(x) for x in (labels, logits, rows.weights)))
        return formulas.pair_losses(self.surrogate, labels, logits, every, self.normalize)

    def average_losses(self, labels: jax.Array, logits: jax.Array, rows: Rows) -> Any:
        return hooks.call(self.base, "losses", labels, logits, rows=rows)

    def _compute_lagrangians(self, labels: jax.Array, logits: jax.Array, rows: Rows | None) -> jax.Array:
        groups, counts, multipliers = self._groups, self.group_counts, self.group_lagrange_multipliers
        inside = None if groups is None else self._find_groups(rows)
        values = self._price_errors(*self._shift_to_anchors(labels, logits))
        if groups is not None and inside is not None:
            values = values + groups.terms(labels, logits, inside, counts, multipliers)
        if self._has_anchors:
            values = jnp.mean(values, axis=-1)
        # One label needs no mean: the reduction of an axis of size 1 is slow on a CPU.
        return values if values.shape[-1] == 1 else jnp.mean(values, axis=-1, keepdims=True)

    def _find_groups(self, rows: Rows | None) -> jax.Array:
        """Returns 1 where a row is in a group, else 0, `[..., 1, groups]`; NaN where a group does not exist."""
        if not isinstance(rows, Rows) or rows.groups is None:
            raise ValueError(
                f"losses does not look up the group of a row, which group_rate needs. Given {self.group_rate!r}. Call "
                "head.loss(labels, logits, features), or take the losses of head.base."
            )
        return rows.groups[..., None, :]

    def _price_errors(self, labels: jax.Array, logits: jax.Array) -> jax.Array:
        errors, counted = self._split_errors(labels, logits)
        if not self._is_constrained:
            return errors[0] + errors[1]
        return formulas.lagrangian(
            jax.tree.map(lambda x: leading(x, logits), self._problem),
            leading(self.lagrange_multipliers, logits),
            leading(self._share_positives() if not self._has_anchors else self._share_positives()[:, None], logits),
            errors,
            formulas.SCALE[self.surrogate],
            counted if self.constraint == "zero_one" else None,
        )

    def _shift_to_anchors(self, labels: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns labels and logits, `[..., n]`; with anchors, labels `[..., n, 1]` and logits `[..., n, anchors]`."""
        if not self._has_anchors:
            return labels, logits
        return labels[..., None], logits[..., None] + leading(self.anchor_biases, logits[..., None])

    def _split_errors(self, labels: jax.Array, logits: jax.Array) -> tuple[Any, Any]:
        """Returns the surrogates of both kinds of errors, and the errors themselves."""
        surrogates = formulas.surrogates(self.surrogate, logits)
        return tuple(formulas.split(labels, errors) for errors in (surrogates, formulas.indicators(logits)))  # pyright: ignore[reportReturnType]  # two

    def advance(self, labels: jax.Array, logits: jax.Array, rows: Rows) -> Mapping[str, Any]:
        new, weights = {}, rows.weights
        if self.label_counts is not None:
            both = labels * weights, weights * masking.ones_like(labels)
            seen = rows.devices.sum(jnp.stack([masking.column_totals(x) for x in both]))
            new["label_counts"] = pairs.add(self.label_counts, seen[..., None])
        if self._groups is not None:
            new["group_counts"] = self._groups.advance(self.group_counts, labels, logits, self._find_groups(rows), rows)
        return new

    # Predictions.

    def outputs(self, logits: jax.Array) -> dict[str, Any]:
        out = dict(self.base.outputs(logits))
        if self.operating_point is None and self.is_of_pairs:
            return out

        def at(logits: jax.Array) -> jax.Array:
            if self.operating_point is None and self._has_anchors:
                return masking.ones_like(logits[..., None]) * leading(-self.anchor_biases, logits[..., None])
            point = np.asarray(self._repeat(self.operating_point or 0.0), np.float32)
            return masking.ones_like(logits) * leading(point, logits)

        def decisions() -> jax.Array:
            point = at(logits)
            return ((logits[..., None] if point.ndim > logits.ndim else logits) > point).astype(jnp.int32)

        return {**out, "operating_point": lambda: at(logits), "decisions": decisions}

    # Metrics.

    def sources(self, labels: jax.Array, logits: jax.Array) -> Mapping[str, Callable[[], Observation]]:
        return self.base.sources(labels, logits)

    def observe(self, labels: jax.Array, logits: jax.Array, rows: Rows) -> dict[str, Observation]:
        found: dict[str, Observation] = dict(hooks.call(self.base, "observe", labels, logits, rows=rows))
        if self.is_of_pairs:
            return found
        # Each element counts as often as it does in the loss.
        lead, scale = logits.shape[:-1], rows.scale

        def sums(*columns: jax.Array) -> Sums:
            flat = [x.reshape(*lead, math.prod(x.shape[len(lead) :])) for x in columns]
            return Sums(tuple(flat if scale is None else [x * scale for x in flat]))

        found[LAGRANGIAN] = Mean(*Term(self._compute_lagrangians(labels, logits, rows)).scaled(scale))
        if self._is_constrained:
            entries, decided = self._shift_to_anchors(labels, logits)
            surrogates, counted = self._split_errors(entries, decided)
            multipliers = masking.ones_like(decided) * leading(self.lagrange_multipliers, decided)
            found[RATES] = sums(labels, 1 - labels, *surrogates, *counted, multipliers)
        if self._groups is not None:
            multipliers = self.group_lagrange_multipliers
            found[GROUPS] = sums(*self._groups.columns(labels, logits, self._find_groups(rows), multipliers))
        return found

    def summarize(self, seen: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the metrics of the base head, then the metrics of the objective."""
        values = {**self.base.summarize({key: x for key, x in seen.items() if key not in (LAGRANGIAN, RATES, GROUPS)})}
        if self.is_of_pairs:
            return values
        values["lagrangian"] = seen[LAGRANGIAN].mean
        if self._is_constrained:
            scale = formulas.SCALE[self.surrogate]
            values |= _rates.read_constraint(seen[RATES], self._problem, self._shape, scale)
        if self._groups is not None:
            values |= self._groups.violations(seen[GROUPS])
        return values | self._read_achieved(seen[SCORES])

    @property
    def higher_is_better(self) -> Mapping[str, bool]:
        """The directions of the base head's metrics, and of the objective's metrics."""
        costs = dict.fromkeys(("objective", "lagrangian", "constraint_violation", "group_violation"), False)
        keys = [_rates.achieved_key(self.objective, t) for t in self._repeat(self.target or 0)]
        achieved = dict.fromkeys(keys, self.objective != formulas.FPR_AT_TPR)
        return {**self.base.higher_is_better, **costs, **achieved}

    def _read_achieved(self, scores: ScoresView) -> dict[str, Any]:
        """Returns the best value at the target, for the one label, or for each label with a histogram of its own."""
        if self.objective not in CONSTRAINED:
            return {}
        targets = [float(t) for t in self._repeat(self.target)]
        if all(_rates.ACHIEVED[self.objective](t) in self.base.extra_metrics for t in targets):
            return {}  # The base head has this metric already, under the same name.
        if self.logits_dimension == 1:
            return _rates.read_achieved(self.objective, targets[0], scores)
        return {
            join_names(key, scores.names[label]): value
            for label, view in scores.columns.items()
            for key, value in _rates.read_achieved(self.objective, targets[label], view).items()
        }

    def read_loss(self, seen: Mapping[str, Any], divisor: Any) -> Any:
        """Returns the Lagrangian of all data seen; for pairs, the share of pairs in the wrong order.

        Losses of pairs do not add up over batches. The share is a mean over labels: every label must have metrics of
        its own.
        """
        if self.is_of_pairs:
            return _rates.read_misordered(seen[SCORES], self.logits_dimension)
        return super().read_loss({**seen, AVERAGE_LOSS: seen[LAGRANGIAN]}, divisor)


def _is_finite(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and bool(np.isfinite(x))

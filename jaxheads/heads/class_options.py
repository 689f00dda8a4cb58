"""The options that heads of classes share: smoothed labels, weights of classes, focus, and shifts by their shares."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.contract import Rows, running
from jaxheads.heads import loss_functions
from jaxheads.numerics import brief, masking, pairs

RUNNING = "running"
# What a class has that a dict by class leaves out.
DEFAULTS = {"class_weights": 1.0, "pos_weight": 1.0, "decision_threshold": 0.5}
# By how much shares that add up to 1 may be off: bfloat16 rounds each by up to 0.004.
TOLERANCE = 1e-3


class AbstractClassHead(loss_functions.AbstractLossFnHead):
    """A head of classes, with the options of its own loss. Each is off by default, and none goes with a `loss_fn`.

    Options are a part of the loss, so `average_loss` and what is read from it, `Perplexity`, have them. They are no
    multiplicities: no denominator and no other metric sees them. `predictions` never see them.

    Args:
        label_smoothing: the part e of each label that is spread evenly over the classes: `(1 - e) y + e / n`, where a
            logit of its own has two classes, `(1 - e) y + e / 2` (as optax and Keras).
        class_weights: the factor of the loss of each class: a sequence, or a dict by class (name or id) in which
            classes that are left out weigh 1.
        focal_gamma: the exponent g of the focal loss (Lin et al. 2017): the part of each class in the loss is
            multiplied by `(1 - p)^g`, where p is the predicted probability of that class.
        focal_alpha: the factor of the focal loss.
        logit_adjustment: the shares of the classes in the training data, or their logarithms; the loss takes
            `z_k + ln share_k` in place of `z_k` (Menon et al. 2021), so that predictions are those of balanced classes.
            `"running"` counts the shares of weighted rows in training; before, and for each class, it counts one row.
    """

    _: dataclasses.KW_ONLY
    label_smoothing: float = 0.0
    class_weights: Sequence[float] | Mapping[Any, float] | None = None
    focal_gamma: float | None = None
    focal_alpha: float | Sequence[float] | None = None
    logit_adjustment: float | Sequence[float] | Mapping[Any, float] | str | None = None
    class_counts: Any = running(lambda head: head.start_counts())

    def __post_init__(self):
        for name in (*self.option_names, "decision_threshold"):
            given = getattr(self, name, None)
            if isinstance(given, (np.ndarray, jax.Array)) and given.ndim == 0:
                object.__setattr__(self, name, given.item())
        for name in self.by_class:
            object.__setattr__(self, name, self._list_by_class(name, getattr(self, name)))
        super().__post_init__()

    @property
    def by_class(self) -> tuple[str, ...]:
        """The names of the options that may be dicts by class."""
        return "class_weights", "logit_adjustment", "focal_alpha"

    @property
    def class_keys(self) -> tuple[Any, ...]:
        """The names of the classes, or their ids, as the keys of a dict by class."""
        raise NotImplementedError

    def _list_by_class(self, name: str, given: Any) -> Any:
        """Returns numbers of all classes as a tuple, from a dict or an array; other values as they are."""
        if isinstance(given, (np.ndarray, jax.Array)) and given.ndim == 1:
            return tuple(np.asarray(given, np.float64).tolist())
        if not isinstance(given, Mapping):
            return given
        keys = self.class_keys
        if len({keys[key] if isinstance(key, int) and 0 <= key < len(keys) else key for key in given}) < len(given):
            raise ValueError(f"{name} names a class twice, by its name and its id. Given {brief.tell(given)}.")
        ids = {**{i: i for i in range(len(keys))}, **{key: i for i, key in enumerate(keys)}}
        if strangers := [key for key in given if key not in ids]:
            raise ValueError(
                f"{name} has classes that this head lacks: {brief.tell(strangers)}. Expected keys among "
                f"{brief.tell(list(keys))}."
            )
        if name not in DEFAULTS and len(given) < len(keys):
            raise ValueError(
                f"{name} needs a number for each of the {len(keys)} classes. Given {len(given)}: {brief.tell(given)}."
            )
        values: list[Any] = [DEFAULTS.get(name)] * len(keys)
        for key, value in given.items():
            values[ids[key]] = value
        return tuple(values)

    @property
    def has_options(self) -> bool:
        """Whether any option changes the loss."""
        return bool(self._list_options())

    def _list_options(self) -> list[str]:
        values = {name: getattr(self, name) for name in self.option_names}
        return [name for name, value in values.items() if value is not None and value != 0]

    @property
    def option_names(self) -> tuple[str, ...]:
        """The names of the options: off where None or 0."""
        return "label_smoothing", "class_weights", "focal_gamma", "focal_alpha", "logit_adjustment"

    def check_options(self, n: int) -> None:
        """Refuses illegal values of the options, for a head of `n` classes."""
        if self.loss_fn is not None and (given := self._list_options()):
            raise ValueError(
                f"{type(self).__name__} has a loss_fn, so {given} would change nothing: they are options of its own "
                f"loss. Leave out loss_fn, or {brief.tell(given)}."
            )
        check_number("label_smoothing", self.label_smoothing, "a number in [0, 1)", lambda x: 0 <= x < 1)
        check_factors("class_weights", self.class_weights, n)
        if self.focal_gamma is not None:
            check_number("focal_gamma", self.focal_gamma, "a finite number of at least 0", lambda x: x >= 0)
        elif self.focal_alpha is not None:
            raise ValueError(
                f"focal_alpha={self.focal_alpha!r} is a factor of the focal loss, which needs focal_gamma. Given "
                "focal_gamma=None. Pass focal_gamma=2.0, or class_weights in place of focal_alpha."
            )

    def start_counts(self) -> Any:
        """Returns the counts of classes before the first batch, compensated pairs; None if shares are not counted."""
        if self.logit_adjustment != RUNNING:
            return None
        first = np.ones(self.counts_shape, np.float32)
        return np.stack([first, np.zeros_like(first)], axis=-1)

    @property
    def counts_shape(self) -> tuple[int, ...]:
        """The shape of the counts."""
        return (self.logits_dimension,)

    def count_classes(self, labels: jax.Array, logits: jax.Array, weights: jax.Array) -> jax.Array:
        """Returns the weight of each class in a batch, of the shape `counts_shape`."""
        raise NotImplementedError

    def advance(self, labels: jax.Array, logits: jax.Array, rows: Rows) -> Mapping[str, Any]:
        if self.class_counts is None:
            return {}
        seen = rows.devices.sum(self.count_classes(labels, logits, rows.weights))
        return {"class_counts": pairs.add(self.class_counts, seen[..., None])}

    def count_two(self, labels: jax.Array, weights: jax.Array) -> jax.Array:
        """Returns the weights of negatives and of positives of each logit, `[2, n]`."""
        return jnp.stack([masking.column_totals(masking.weighted(y, weights)) for y in (1 - labels, labels)])

    @property
    def log_counts(self) -> jax.Array:
        """The logarithms of the counts so far."""
        return jnp.log(jnp.sum(self.class_counts, axis=-1))


def check_number(name: str, value: Any, expected: str, is_legal: Any) -> None:
    """Refuses a value that is not a finite number for which `is_legal` holds."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not is_legal(value):
        raise ValueError(f"{name} must be {expected}. Given {brief.tell(value)}.")


def check_each(name: str, values: Any, n: int, expected: str, is_legal: Any) -> None:
    """Refuses values that are not one number for each of `n` classes."""
    if not isinstance(values, tuple) or len(values) != n:
        given = f"{len(values)} values" if isinstance(values, tuple) else brief.tell(values)
        raise ValueError(f"{name} must be a sequence of {n} numbers, one for each class. Given {given}.")
    for i, value in enumerate(values):
        check_number(f"{name}[{i}]", value, expected, is_legal)


def check_factors(name: str, values: Any, n: int) -> None:
    """Refuses values that are no factors of `n` classes: finite, not negative, and not all 0."""
    if values is None:
        return
    check_each(name, values, n, "a finite number of at least 0", lambda x: x >= 0)
    if not any(values):
        raise ValueError(f"{name} must not all be 0: no row would count. Given {brief.tell(values)}.")


def as_shares(name: str, values: Any, n: int) -> tuple[float, ...]:
    """Returns the shares of classes that exclude each other, from shares or their logarithms."""
    check_each(name, values, n, "a share above 0, or its logarithm", lambda x: x != 0)
    if all(x < 0 for x in values):
        values = tuple(math.exp(x) for x in values)
    if min(values) <= 0 or abs(math.fsum(values) - 1) > TOLERANCE:
        raise ValueError(
            f"{name} must hold the share of each class, above 0, and 1 in all (or their logarithms). Given "
            f"{brief.tell(values)}, {math.fsum(values):.6g} in all. Divide counts by their sum; leave out classes "
            "that never occur, or count them once."
        )
    return values


def as_share(name: str, value: Any) -> float:
    """Returns the share of positives, from the share or its logarithm."""
    expected = "a share of positives between 0 and 1, or its logarithm"
    check_number(name, value, expected, lambda x: 0 < (math.exp(x) if x < 0 else x) < 1)
    return math.exp(value) if value < 0 else value

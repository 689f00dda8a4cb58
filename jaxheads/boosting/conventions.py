"""The conventions of XGBoost and LightGBM: where the derivatives of their objectives differ from those of the loss.

| head | gradient | Hessian, XGBoost | Hessian, LightGBM |
| --- | --- | --- | --- |
| `RegressionHead`, squared error | half: `z - y` | 1 | 1 |
| with `objective="absolute_error"` or `"huber"` | that of the loss | 1 | 1 |
| `BinaryClassHead`, `LogisticRegressionHead` | `p - y` | `p (1 - p)` | `p (1 - p)` |
| `PoissonRegressionHead` | `exp(z) - y` | `exp(z + max_delta_step)` | `exp(z + max_delta_step)` |
| `MultiClassHead(K)` | `p - 1[y = k]` | `2 p (1 - p)` | `K / (K - 1) p (1 - p)` |
| `MultiLabelHead(K)` | times K: `p - y` | times K: `p (1 - p)` | times K: `p (1 - p)` |

A `RegressionHead` with `label_mean` and `label_scale` has the standardized y in place of y. XGBoost has no Huber loss;
the Hessian is LightGBM's there too, because that of the loss is 0 where errors are large. Both libraries set the leaves
of their absolute errors anew after each tree, to medians, which no objective of a user's can do.

With options of the loss (class weights and others) the gradient is that of the loss at the same scale, and the Hessian
the exact one times the factor of the table.

Read off `regression_obj.h`, `multiclass_obj.cu` (XGBoost 3.2) and `regression_objective.hpp`,
`binary_objective.hpp`, `multiclass_objective.hpp` (LightGBM 4.7).
"""

import dataclasses
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.head import Head
from jaxheads.heads import (
    BinaryClassHead,
    LogisticRegressionHead,
    MultiClassHead,
    MultiLabelHead,
    PoissonRegressionHead,
    RegressionHead,
)
from jaxheads.heads.class_options import AbstractClassHead
from jaxheads.heads.loss_functions import AbstractLossFnHead
from jaxheads.numerics import brief

LIBRARIES = ("xgboost", "lightgbm")
Hessian: TypeAlias = str | Callable[[Any, jax.Array], Any]
HESSIANS = ("auto", "exact", "gauss_newton", "unit")


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of `derivatives`, checked.

    Attributes:
        hessian, floor, library, max_delta_step: as for `derivatives`.
    """

    hessian: Hessian = "auto"
    floor: float = 1e-16
    library: str = "xgboost"
    max_delta_step: float = 0.7

    def __post_init__(self):
        if not callable(self.hessian) and not brief.is_one_of(self.hessian, HESSIANS):
            raise ValueError(
                f"hessian must be one of {HESSIANS}, or a function (labels, logits) -> h. Given {self.hessian!r}."
            )
        if not brief.is_one_of(self.library, LIBRARIES):
            raise ValueError(f"library must be one of {LIBRARIES}. Given {self.library!r}.")
        for name, value in (("floor", self.floor), ("max_delta_step", self.max_delta_step)):
            if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= float(value) < np.inf:
                raise ValueError(f"{name} must be a finite number, not negative. Given {value!r}.")
            object.__setattr__(self, name, float(value))


class Convention(NamedTuple):
    """How a library's derivatives differ from those of the loss.

    Attributes:
        scale: the factor of the gradient.
        curvature: gives the library's Hessian `[..., d]` of elements of weight 1, from their logits; None for the exact
            one times `factor`.
        factor: of the exact Hessian.
    """

    scale: float
    curvature: Callable[[jax.Array], jax.Array] | None
    factor: float = 1.0


def find_convention(head: Head, options: Options) -> Convention | None:
    """Returns the library's convention for this head's loss; None where the library has no such objective."""
    if _has_loss_fn(head):
        return None
    if isinstance(head, RegressionHead):
        scales = {"squared_error": 0.5, "absolute_error": 1.0, "huber": 1.0}
        return Convention(scales[head.objective], jnp.ones_like) if head.objective in scales else None
    # 1 - sigmoid(z) would be 0 from z = 17 on.
    bernoulli = Convention(1.0, lambda logits: jax.nn.sigmoid(logits) * jax.nn.sigmoid(-logits))
    # With options the curvature is the exact one, scaled as without: options that change nothing give the same trees.
    has_options = isinstance(head, AbstractClassHead) and head.has_options
    if isinstance(head, (BinaryClassHead, LogisticRegressionHead)):
        return Convention(1.0, None) if has_options else bernoulli
    if isinstance(head, MultiLabelHead):
        scale = float(head.n_classes) if head.reduce_classes == "mean" else 1.0
        return Convention(scale, None, scale) if has_options else bernoulli._replace(scale=scale)
    if isinstance(head, PoissonRegressionHead):
        return Convention(1.0, lambda logits: jnp.exp(logits + options.max_delta_step))
    if isinstance(head, MultiClassHead):
        factor = 2.0 if options.library == "xgboost" else head.n_classes / (head.n_classes - 1)

        def curve(logits: jax.Array) -> jax.Array:
            p = jax.nn.softmax(logits, axis=-1)
            return factor * (p * (1 - p))

        return Convention(1.0, None, factor) if has_options or head.label_kind != "ids" else Convention(1.0, curve)
    return None


def is_separable(head: Head) -> bool:
    """Tells whether the loss is known to be a sum over logits. One pass then gives the diagonal of its Hessian."""
    one_each = (RegressionHead, PoissonRegressionHead, MultiLabelHead)
    return head.logits_dimension == 1 or (isinstance(head, one_each) and not _has_loss_fn(head))


def _has_loss_fn(head: Head) -> bool:
    return isinstance(head, AbstractLossFnHead) and head.loss_fn is not None

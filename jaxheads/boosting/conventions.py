"""What XGBoost and LightGBM take for the derivatives of their own objectives, where that is not the loss's own.

| head | gradient | Hessian, XGBoost | Hessian, LightGBM |
| --- | --- | --- | --- |
| `RegressionHead` | half: `z - y` | 1 | 1 |
| `BinaryClassHead`, `LogisticRegressionHead` | `p - y` | `p (1 - p)` | `p (1 - p)` |
| `PoissonRegressionHead` | `exp(z) - y` | `exp(z + max_delta_step)` | `exp(z + max_delta_step)` |
| `MultiClassHead(K)` | `p - 1[y = k]` | `2 p (1 - p)` | `K / (K - 1) p (1 - p)` |
| `MultiLabelHead(K)` | times K: `p - y` | times K: `p (1 - p)` | times K: `p (1 - p)` |

Read off `regression_obj.h`, `multiclass_obj.cu` (XGBoost 3.2) and `regression_objective.hpp`,
`binary_objective.hpp`, `multiclass_objective.hpp` (LightGBM 4.7).
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxheads.head import Head
from jaxheads.heads import (
    BinaryClassHead,
    LogisticRegressionHead,
    MultiClassHead,
    MultiLabelHead,
    PoissonRegressionHead,
    RegressionHead,
)
from jaxheads.heads.loss_functions import AbstractLossFnHead

LIBRARIES = ("xgboost", "lightgbm")


@dataclasses.dataclass(frozen=True)
class Options:
    """Whose convention, and its option.

    Attributes:
        library: `"xgboost"` or `"lightgbm"`.
        max_delta_step: of the Poisson objectives: the Hessian is that at a logit so much larger.
    """

    library: str = "xgboost"
    max_delta_step: float = 0.7


class Convention(NamedTuple):
    """How a library's derivatives differ from those of the loss.

    Attributes:
        scale: what the gradient is multiplied by.
        curvature: the library's Hessian `[..., d]` from logits, of an element of weight 1.
    """

    scale: float
    curvature: Callable[[jax.Array], jax.Array]


def convention(head: Head, options: Options) -> Convention | None:
    """Returns the library's convention for this head's loss; None where the library has no such objective."""
    if _has_loss_fn(head):
        return None
    if isinstance(head, RegressionHead):
        return Convention(0.5, jnp.ones_like)
    if isinstance(head, (BinaryClassHead, LogisticRegressionHead)):
        return Convention(1.0, _bernoulli)
    if isinstance(head, MultiLabelHead):
        return Convention(float(head.n_classes), _bernoulli)
    if isinstance(head, PoissonRegressionHead):
        return Convention(1.0, lambda logits: jnp.exp(logits + options.max_delta_step))
    if isinstance(head, MultiClassHead):
        factor = 2.0 if options.library == "xgboost" else head.n_classes / (head.n_classes - 1)
        return Convention(1.0, lambda logits: factor * _variance(jax.nn.softmax(logits, axis=-1)))
    return None


def is_separable(head: Head) -> bool:
    """Tells whether the loss is known to be a sum over logits. One pass then gives the diagonal of its Hessian."""
    one_each = (RegressionHead, PoissonRegressionHead, MultiLabelHead)
    return head.logits_dimension == 1 or (isinstance(head, one_each) and not _has_loss_fn(head))


def _has_loss_fn(head: Head) -> bool:
    return isinstance(head, AbstractLossFnHead) and head.loss_fn is not None


def _variance(p: jax.Array) -> jax.Array:
    return p * (1 - p)


def _bernoulli(logits: jax.Array) -> jax.Array:
    # 1 - p would be 0 from z = 17 on.
    return jax.nn.sigmoid(logits) * jax.nn.sigmoid(-logits)

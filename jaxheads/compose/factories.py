"""Functions that choose a head."""

from typing import Any

from jaxheads.head import Head
from jaxheads.heads import BinaryClassHead, MultiClassHead
from jaxheads.numerics import inputs


def binary_or_multi_class_head(n_classes: int, **kwargs: Any) -> Head:
    """Returns a `BinaryClassHead` for two classes, else a `MultiClassHead`.

    Args:
        n_classes: at least 2.
        **kwargs: `weight_column`, `label_vocabulary`, `loss_reduction`, `loss_fn`, `name`.

    >>> binary_or_multi_class_head(2, name="late"), binary_or_multi_class_head(3)
    (BinaryClassHead(name='late'), MultiClassHead(n_classes=3))
    """
    if not inputs.is_integer(n_classes, 2):
        raise ValueError(f"n_classes must be an integer of at least 2. Given: {n_classes!r}.")
    return BinaryClassHead(**kwargs) if n_classes == 2 else MultiClassHead(n_classes, **kwargs)

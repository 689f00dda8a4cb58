"""What heads made of heads share."""

from typing import Any, ClassVar

from jaxheads.head import Head
from jaxheads.numerics.configuration import Configuration


class AbstractCompositeHead(Head):
    """A head made of heads: what weights, names and reductions say is said by the heads inside, not by arguments."""

    weight_column: ClassVar[None] = None  # pyright: ignore[reportIncompatibleVariableOverride]  # no argument here
    name: ClassVar[Any] = None  # pyright: ignore[reportIncompatibleVariableOverride]  # no argument here
    loss_reduction: ClassVar[Any] = None  # pyright: ignore[reportIncompatibleVariableOverride]  # no argument here

    def __post_init__(self):
        Configuration.__post_init__(self)

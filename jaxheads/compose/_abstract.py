"""What heads made of heads share."""

from typing import Any, ClassVar

from jaxheads.head import Head
from jaxheads.numerics.configuration import Configuration


class AbstractCompositeHead(Head):
    """A head made of heads: what weights, names and reductions say is said by the heads inside, not by arguments."""

    weight_column: ClassVar[None] = None  # pyright: ignore[reportIncompatibleVariableOverride]  # no argument here
    name: ClassVar[Any] = None  # pyright: ignore[reportIncompatibleVariableOverride]  # no argument here
    loss_reduction: ClassVar[Any] = None  # pyright: ignore[reportIncompatibleVariableOverride]  # no argument here
    extra_metrics: ClassVar[Any] = ()  # pyright: ignore[reportIncompatibleVariableOverride]  # no argument here

    slices: ClassVar[Any] = None  # pyright: ignore[reportIncompatibleVariableOverride]  # no argument here
    bootstrap: ClassVar[Any] = None  # pyright: ignore[reportIncompatibleVariableOverride]  # no argument here

    def __post_init__(self):
        Configuration.__post_init__(self)

    def with_metrics(self, *metrics: Any, **functions: Any) -> Any:
        """Refused: the heads inside have metrics."""
        raise ValueError(
            f"A {type(self).__name__} has the metrics of the heads inside it. Give them to those: build it of "
            "head.with_metrics(...)."
        )

"""The common base of heads made of heads."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from jaxheads.head import Head
from jaxheads.numerics import fields
from jaxheads.numerics.configuration import Configuration
from jaxheads.numerics.hooks import hook
from jaxheads.spec import ExportOutput


class AbstractCompositeHead(Head):
    """A head made of heads. The heads inside have weights, names and reductions. The composite has no such arguments.

    All heads inside have the same slices and the same bootstrap.
    """

    weight_column: ClassVar[None] = None  # pyright: ignore[reportIncompatibleVariableOverride]  # no argument here
    name: ClassVar[Any] = None  # pyright: ignore[reportIncompatibleVariableOverride]  # no argument here
    loss_reduction: ClassVar[Any] = None  # pyright: ignore[reportIncompatibleVariableOverride]  # no argument here
    extra_metrics: ClassVar[Any] = ()  # pyright: ignore[reportIncompatibleVariableOverride]  # no argument here
    slices: ClassVar[Any] = property(lambda self: self.first.slices, doc="The slices of all heads inside.")  # pyright: ignore[reportIncompatibleVariableOverride]  # no argument here
    bootstrap: ClassVar[Any] = property(lambda self: self.first.bootstrap, doc="The bootstrap of all heads inside.")  # pyright: ignore[reportIncompatibleVariableOverride]  # no argument here

    @property
    @abc.abstractmethod
    def first(self) -> Head:
        """The first head inside."""

    def __post_init__(self):
        Configuration.__post_init__(self)

    def with_metrics(self, *metrics: Any, **functions: Any) -> Any:
        """Raises `ValueError`: the metrics belong to the heads inside."""
        raise ValueError(
            f"A {type(self).__name__} has the metrics of the heads inside it. Give them to those: build it of "
            "head.with_metrics(...)."
        )


class AbstractWrapperHead(AbstractCompositeHead):
    """A head around one other head, under the name "". A member that it does not override comes from the inner head."""

    @property
    @abc.abstractmethod
    def wrapped(self) -> Head:
        """The head inside."""

    @property
    def first(self) -> Head:
        return self.wrapped

    def parts(self) -> Mapping[str, Head]:
        return {"": self.wrapped}

    @property
    def suffix(self) -> str | None:
        """The inner head's suffix."""
        return self.wrapped.suffix

    @property
    def loss_reduction(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]  # no argument here
        """The inner head's reduction."""
        return self.wrapped.loss_reduction

    @property
    def logits_dimension(self) -> int:
        return self.wrapped.logits_dimension

    @property
    def label_spec(self) -> Any:
        return self.wrapped.label_spec

    @property
    def vocabulary(self) -> tuple[str, ...] | None:
        return self.wrapped.vocabulary

    def to_array(self, labels: Any, ids: bool) -> Any:
        return self.wrapped.to_array(labels, ids)

    @property
    def coupling(self) -> Any:
        return self.wrapped.coupling

    @property
    def signed(self) -> bool:
        return self.wrapped.signed

    def combine(self, losses: Mapping[str, Any], shares: Mapping[str, Any]) -> Any:
        return losses[""]

    @hook
    def losses(self, labels: Any, logits: Any, *extra: Any) -> Any:
        """Returns the inner head's losses."""
        return self.wrapped.losses(labels, logits, *extra)

    def outputs(self, logits: Any) -> Mapping[str, Any]:
        return self.wrapped.outputs(logits)

    def with_metrics(self, *metrics: Any, **functions: Any) -> Any:
        """Returns the same wrapper around the inner head with more metrics. They see the same mask as the others."""
        (field,) = fields.of_kind(type(self), fields.HEADS)
        return dataclasses.replace(self, **{field.name: self.wrapped.with_metrics(*metrics, **functions)})

    def encode_labels(self, labels: Any, where: Any = None) -> Any:
        """Encodes labels with the inner head."""
        return self.wrapped.encode_labels(labels, where)

    def decode_predictions(self, predictions: Mapping[str, Any]) -> dict[str, Any]:
        """Decodes predictions with the inner head."""
        return self.wrapped.decode_predictions(predictions)

    def signatures(self, predictions: Mapping[str, Any]) -> Mapping[str, ExportOutput]:
        return self.wrapped.signatures(predictions)

    def class_names(self) -> tuple[str, ...] | None:
        return self.wrapped.class_names()

"""Any head on sequences of different lengths."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxheads.compose import _steps
from jaxheads.compose._abstract import AbstractWrapperHead
from jaxheads.contract import Batch, Given, subheads
from jaxheads.engine import trees
from jaxheads.head import Head
from jaxheads.numerics import brief, columns, inputs
from jaxheads.numerics.batch import ABSENT

MASK = "sequence_length_mask"
AVERAGES = ("steps", "sequences")


class SequentialHeadWrapper(AbstractWrapperHead):
    """A head applied at every step of padded sequences: tagging, forecasting, language.

    The steps that exist, by a mask or by lengths, are the batch of the inner head. Nothing is reshaped, so the wrapper
    works under `jit`. The inner head may be of any kind, also a `MultiHead`.

    **Domain**: `labels` and `logits` as the inner head takes them, with leading axes `[B, T]`. The mask is a column of
    `features`, bool or 0/1 `[B, T]`. Gaps are allowed. `sequence_lengths` names a column of lengths `[B]` instead. With
    `sequence_length_mask=None`, every step exists that `where` does not mask.

    **Link**: the link of the inner head.

    **loss** = the inner head's loss of the steps that exist. `average_over="sequences"` first takes the mean over the
    steps of each sequence, so that long sequences do not count more. `average_loss` does the same. All other metrics
    count steps.

    **Predictions**: the predictions of the inner head, at every step, padding included.
    **Metrics**: the metrics of the inner head, under its names.

    Args:
        static_head: the inner head.
        sequence_length_mask: the key of the mask in `features`; None if there is none.
        feature_columns: the keys of `features` that reach the inner head, such as a weight column, or the inputs of a
            `loss_fn`. A `[B, T]` column arrives as `[B, T, 1]`. Other keys do not reach the inner head.
        sequence_lengths: the key of a column of lengths, in place of the mask.
        average_over: `"steps"` or `"sequences"`. For `"sequences"`, the steps of a sequence must be on one device.

    Raises:
        ValueError: keys that are not strings; features without the mask or without a listed column; a mask that is not
            `[B, T]`, or lengths outside 0 ... T; also the errors of the inner head.

    Source: `SequentialHeadWrapper` of `tf.estimator` (TensorFlow 2.15), behind its `RNNClassifier`.

    >>> import jax.numpy as jnp
    >>> import jaxheads as jh
    >>> head = jh.SequentialHeadWrapper(jh.BinaryClassHead(), sequence_lengths="lengths")
    >>> labels, logits = jnp.array([[1, 0, 9], [1, 9, 9]]), jnp.array([[[1.0], [-1.0], [0.0]], [[2.0], [0.0], [0.0]]])
    >>> features = {"lengths": jnp.array([2, 1])}
    >>> head.measure(labels=labels, logits=logits, features=features).compute()["label/mean"]
    0.6666667
    """

    static_head: Head = subheads()
    sequence_length_mask: str | None = MASK
    feature_columns: Sequence[str] | str | None = None
    sequence_lengths: str | None = None
    average_over: str = "steps"

    @property
    def name(self) -> str | None:  # pyright: ignore[reportIncompatibleVariableOverride]  # no argument here
        """The inner head's name with `_sequential` appended; metrics keep the inner head's own name."""
        return f"{self.static_head.name}_sequential" if self.static_head.name else None

    @property
    def wrapped(self) -> Head:
        """The inner head."""
        return self.static_head

    def validate(self) -> None:
        keys = {"sequence_length_mask": self.sequence_length_mask, "sequence_lengths": self.sequence_lengths}
        for field, key in keys.items():
            if not isinstance(key, str) and key is not None:
                raise ValueError(f"{field} must be a string, a key of features. Given type: {type(key).__name__}.")
            if key == "":
                raise ValueError(f"{field} must be a key of features, or None. Given an empty string.")
        if self.sequence_lengths is not None and not brief.is_one_of(self.sequence_length_mask, (None, MASK)):
            raise ValueError(
                "Give sequence_length_mask or sequence_lengths, not both: one would be ignored. Given "
                f"{self.sequence_length_mask!r} and {self.sequence_lengths!r}."
            )
        if not (self.feature_columns is None or isinstance(self.feature_columns, (str, tuple))):
            raise ValueError(
                "feature_columns must be either a string or an iterable of strings. Given type: "
                f"{type(self.feature_columns).__name__}."
            )
        for key in self._listed:
            if not isinstance(key, str):
                given = f"{type(key).__name__} in {self.feature_columns!r}"
                raise ValueError(f"feature_columns must be strings. Given type: {given}.")
        if not isinstance(self.static_head, Head):
            raise ValueError(f"static_head must be a head. Given {self.static_head!r}.")
        if not brief.is_one_of(self.average_over, AVERAGES):
            raise ValueError(f"average_over must be one of {AVERAGES}. Given {self.average_over!r}.")

    @property
    def _listed(self) -> tuple[str, ...]:
        """The feature columns, one or several."""
        return (self.feature_columns,) if isinstance(self.feature_columns, str) else tuple(self.feature_columns or ())

    @property
    def _key(self) -> str | None:
        """The key of the lengths or of the mask; None if there is none."""
        return self.sequence_length_mask if self.sequence_lengths is None else self.sequence_lengths

    # The hooks of a head made of heads, for the engine.

    def route(self, given: Given) -> dict[str, Given]:
        table = columns.table(given.features)
        if given.labels is ABSENT:  # predictions, of every step
            if table is not None and any(leaf.reads_features for leaf in trees.leaves(self.static_head)):
                given = given.replace(features=self._select_columns(table))
            return {"": given}
        # Slices of sequences or of steps are looked up in all columns, not only in the inner head's columns.
        every = given.features if given.columns is None else given.columns
        if (key := self._key) is not None:
            self._check_rank(given.logits)
            lead, column = _steps.find_lead(self.static_head, given), _steps.read_mask(key, columns.table(every))
            if len(lead) < 2:
                expected = f"[B, T, ..., {self.logits_dimension}]"
                raise ValueError(f"logits of sequences must be {expected}. Given leading axes {lead}.")
            mask = _steps.make_mask(column, key, self.sequence_lengths is not None, lead, given.check)
            given = given.replace(where=_steps.add_mask(self.static_head, given.where, mask))
        if given.features is not None:
            self._check_columns(table)
            given = given.replace(features=self._select_columns(table), columns=every)
        return {"": given}

    def prepared(self, batch: Batch) -> Batch:
        """Counts each step as its share of a sequence, if `average_over` is "sequences"."""
        return batch if self.average_over == "steps" else batch.map_leaves(_steps.scale_steps)

    def served(self, predictions: dict[str, Any], features: Any) -> dict[str, Any]:
        """Adds the mask (or the lengths) to the predictions, so that a server can tell which steps exist."""
        if (key := self._key) is None:
            return predictions
        mask = _steps.read_mask(key, columns.table(features))
        if key in predictions:
            raise ValueError(f"The key {key!r} of the mask is a prediction key too: {sorted(predictions)}. Rename it.")
        return {**predictions, key: mask}

    def _check_rank(self, logits: Any) -> None:
        """Refuses logits without an axis of steps."""
        if logits is ABSENT or isinstance(logits, Mapping) or len(shape := tuple(jnp.shape(logits))) > 2:
            return
        raise ValueError(f"logits of sequences must be [B, T, ..., {self.logits_dimension}]. Given shape {shape}.")

    def _check_columns(self, features: Any) -> None:
        """Refuses features without a listed column, and a weight column that is not listed."""
        for column in (leaf.weight_column for leaf in trees.leaves(self.static_head)):
            if isinstance(column, str) and column in features and column not in self._listed:
                raise ValueError(
                    f"Feature {column} (the weight_column of the inner head) does not reach it: only feature_columns "
                    f"do. Given feature_columns={self.feature_columns!r}. Add it there."
                )
        for key in self._listed:
            if key not in features:
                raise ValueError(
                    f"{key!r} column (of feature_columns) expected in features dictionary. Found keys: "
                    f"{brief.tell_names(features)}."
                )

    def _select_columns(self, features: Any) -> dict[str, Any]:
        """Returns the listed columns that are there, in the form that the inner head gets."""
        kept = {}
        for key in (key for key in self._listed if key in features):
            column = inputs.as_array(features[key], f"features[{key!r}]")
            if column.ndim < 2:
                raise ValueError(
                    f"features[{key!r}] of a sequence is expected to have at least 2 dimensions, [B, T]. Given shape "
                    f"{tuple(column.shape)}."
                )
            kept[key] = column[..., None] if column.ndim == 2 else column
        return kept

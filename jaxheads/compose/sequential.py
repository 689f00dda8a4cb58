"""Any head on sequences of different lengths."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxheads.compose._abstract import AbstractWrapperHead
from jaxheads.contract import Batch, Given, subheads
from jaxheads.engine import gathering, trees
from jaxheads.head import Head
from jaxheads.numerics import columns, inputs
from jaxheads.numerics.batch import ABSENT, Mask, Masks

AVERAGES = ("steps", "sequences")


class SequentialHeadWrapper(AbstractWrapperHead):
    """A head applied at every step of padded sequences: tagging, forecasting, language.

    The batch of the inner head is the steps that exist, by a mask or by lengths. Nothing is reshaped, so it works under
    `jit`. The inner head may be of any kind, also a `MultiHead`.

    **Domain**: `labels` and `logits` as the inner head takes them, with leading axes `[B, T]`. The mask is a column of
    `features`, bool or 0/1 `[B, T]`, not necessarily a prefix; or `sequence_lengths` names a column of lengths `[B]`.
    With `sequence_length_mask=None`, every step exists that `where` does not mask.

    **Link**: that of the inner head.

    **loss** = the inner head's loss of the steps that exist. `average_over="sequences"` first takes the mean over the
    steps of each sequence, so that long ones do not count more. So does `average_loss`; other metrics count steps.

    **Predictions**: those of the inner head, at every step, padding included.
    **Metrics**: those of the inner head, under its names.

    Args:
        static_head: the inner head.
        sequence_length_mask: the key of the mask in `features`; None if there is none.
        feature_columns: keys of `features` that reach the inner head (such as a weight column, or the inputs of a
            `loss_fn`), `[B, T]` columns as `[B, T, 1]`; other keys do not reach it.
        sequence_lengths: the key of a column of lengths, in place of the mask.
        average_over: `"steps"` or `"sequences"`. For the latter the steps of a sequence must be on one device.

    Raises:
        ValueError: keys that are not strings; features without the mask or without a listed column; a mask that is not
            `[B, T]`, or lengths outside 0 ... T; also the errors of the inner head.

    Source: `SequentialHeadWrapper` of `tf.estimator` (TensorFlow 2.15), behind its `RNNClassifier`.

    >>> import jax.numpy as jnp
    >>> import jaxheads as jh
    >>> head = jh.SequentialHeadWrapper(jh.BinaryClassHead(), sequence_lengths="lengths")
    >>> labels, logits = jnp.array([[1, 0, 9], [1, 9, 9]]), jnp.zeros((2, 3, 1))
    >>> features = {"lengths": jnp.array([2, 1])}
    >>> head.measure(labels=labels, logits=logits, features=features).compute()["label/mean"]
    np.float32(0.6666667)
    """

    static_head: Head = subheads()
    sequence_length_mask: str | None = "sequence_length_mask"
    feature_columns: Sequence[str] | str | None = None
    sequence_lengths: str | None = None
    average_over: str = "steps"

    @property
    def name(self) -> str | None:  # pyright: ignore[reportIncompatibleVariableOverride]  # made of the inner head's
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
        if self.average_over not in AVERAGES:
            raise ValueError(f"average_over must be one of {AVERAGES}. Given {self.average_over!r}.")

    @property
    def _listed(self) -> tuple[str, ...]:
        """The feature columns, one or several."""
        return (self.feature_columns,) if isinstance(self.feature_columns, str) else tuple(self.feature_columns or ())

    # The hooks of a head made of heads, for the engine.

    def route(self, given: Given) -> dict[str, Given]:
        table = columns.table(given.features)
        if given.labels is ABSENT:  # predictions, of every step
            if table is None or not any(leaf.reads_features for leaf in trees.leaves(self.static_head)):
                return {"": given}
            return {"": given.replace(features=self._listed_columns(table))}
        every = table if given.columns is None else columns.table(given.columns)
        if self.sequence_length_mask is not None or self.sequence_lengths is not None:
            self._check_rank(given.logits)
            lead = _lead(self.static_head, given)
            given = given.replace(
                where=_with_mask(self.static_head, given.where, Mask(*self._mask(every, lead, given.check)))
            )
        if given.features is not None:
            self._check_columns(table)
            # Slices of sequences or of steps are looked up in all columns, not only in those of the inner head.
            given = given.replace(
                features=self._listed_columns(table), columns=given.features if given.columns is None else given.columns
            )
        return {"": given}

    def _check_rank(self, logits: Any) -> None:
        """Refuses logits without an axis of steps."""
        if logits is ABSENT or isinstance(logits, Mapping) or len(shape := tuple(jnp.shape(logits))) > 2:
            return
        raise ValueError(f"logits of sequences must be [B, T, ..., {self.logits_dimension}]. Given shape {shape}.")

    def prepared(self, batch: Batch) -> Batch:
        """Counts each step as its share of a sequence, if `average_over` is "sequences"."""
        return batch if self.average_over == "steps" else batch.map_leaves(_shares_of_sequences)

    def _mask(self, features: Any, lead: tuple[int, ...], check: bool | None) -> tuple[Any, str]:
        """Returns the mask of the steps that exist, in the leading shape of the logits, and its name."""
        key = self.sequence_lengths or self.sequence_length_mask
        if features is None or key not in features:
            raise _without_mask(key, features)
        mask = inputs.as_array(features[key], f"features[{key!r}]")
        shape = tuple(mask.shape)
        if len(lead) < 2:
            raise ValueError(
                f"logits of sequences must be [B, T, ..., {self.logits_dimension}]. Given leading axes {lead}."
            )
        if self.sequence_lengths:
            if shape != lead[:1] or inputs.dtype_kind(mask) != "int":
                raise ValueError(
                    f"features[{key!r}] must be integer lengths of shape {lead[:1]}. Given {mask.dtype}{list(shape)}."
                )
            xp, illegal = (np if isinstance(mask, np.ndarray) else jnp), (mask < 0) | (mask > lead[1])
            if inputs.is_readable(mask, check) and np.asarray(illegal).any():
                raise ValueError(f"features[{key!r}]: lengths must lie in 0 ... {lead[1]}. Given {np.asarray(mask)}.")
            there = xp.arange(lead[1], dtype=np.int32)[None] < mask.astype(np.int32)[:, None]
            # An illegal length that cannot be refused here becomes an illegal mask value, for the compiled check.
            mask = xp.where(illegal[:, None], np.int32(2), there.astype(np.int32))
        elif len(shape) != 2 or shape != lead[:2]:
            raise ValueError(
                f"Mask is expected to have two dimensions, those of the logits, {lead[:2]}. Given features[{key!r}] of "
                f"shape {shape}."
            )
        if len(lead) > 2:
            xp = np if isinstance(mask, np.ndarray) else jnp
            mask = xp.broadcast_to(xp.expand_dims(mask, tuple(range(2, len(lead)))), lead)
        return mask, f"features[{key!r}]"

    def _check_columns(self, features: Any) -> None:
        """Refuses features without a listed column, and a weight column that is not listed."""
        for column in _weight_columns(self.static_head):
            if column in features and column not in self._listed:
                raise ValueError(
                    f"Feature {column} (the weight_column of the inner head) does not reach it: only feature_columns "
                    f"do. Given feature_columns={self.feature_columns!r}. Add it there."
                )
        for key in self._listed:
            if key not in features:
                raise ValueError(
                    f"{key!r} column (of feature_columns) expected in features dictionary. Found keys: "
                    f"{sorted(map(str, features))}."
                )

    def _listed_columns(self, features: Any) -> dict[str, Any]:
        """Returns the listed columns that are there, as the inner head gets them."""
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

    def served(self, predictions: dict[str, Any], features: Any) -> dict[str, Any]:
        """Adds the mask (or the lengths) to the predictions, so that a server can tell which steps exist."""
        key = self.sequence_lengths or self.sequence_length_mask
        if key is None:
            return predictions
        table = columns.table(features)
        if table is None or key not in table:
            raise _without_mask(key, table)
        if key in predictions:
            raise ValueError(f"The key {key!r} of the mask is a prediction key too: {sorted(predictions)}. Rename it.")
        return {**predictions, key: inputs.as_array(table[key], f"features[{key!r}]")}


def _without_mask(key: Any, features: Any) -> ValueError:
    found = None if features is None else sorted(map(str, features))
    return ValueError(
        f"The provided key {key!r} of the mask or the lengths of sequences should be included in the features "
        f"dictionary, but was not found. Found keys: {found}. With sequence_length_mask=None all steps are there that "
        "where= says."
    )


def _shares_of_sequences(batch: Batch) -> Batch:
    exists = gathering.existing(batch).astype(jnp.float32)
    steps = jnp.sum(exists, axis=tuple(range(1, exists.ndim)), keepdims=True)
    return batch.replace(scale=exists / jnp.maximum(steps, jnp.ones_like(steps)))


def _weight_columns(head: Head) -> list[str]:
    """Returns the keys of the weight columns of the heads inside."""
    return [leaf.weight_column for leaf in trees.leaves(head) if isinstance(leaf.weight_column, str)]


def _lead(head: Head, given: Given) -> tuple[int, ...]:
    """Returns the leading axes of the inputs of the heads inside."""
    while inside := head.parts():
        routed = head.route(given.replace(where=None, features=None)) if "" not in inside else {"": given}
        name = next(iter(routed))
        head, given = inside[name], routed[name]
    return gathering.lead_of(head, given)


def _with_mask(head: Head, where: Any, mask: Mask) -> Any:
    """Adds the mask of the sequences to `where`, which is one for all heads or nested by head."""
    inside = head.parts()
    if not isinstance(where, Mapping):
        return Masks((mask, *Masks.of(where)))
    if "" in inside:
        return _with_mask(inside[""], where, mask)
    if unknown := [key for key in where if key not in inside]:
        raise ValueError(f"where given for heads that are not there: {unknown}. The heads are {[*inside]}.")
    return {name: _with_mask(inner, where.get(name), mask) for name, inner in inside.items()}

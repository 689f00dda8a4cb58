"""Several tasks on one network."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.compose._abstract import AbstractCompositeHead
from jaxheads.contract import Given, LinearLogits, learned, subheads
from jaxheads.engine import trees
from jaxheads.head import Head
from jaxheads.metrics.base import LOSS, join_names
from jaxheads.metrics.state import metric_names
from jaxheads.numerics import fields, inputs
from jaxheads.numerics.batch import ABSENT
from jaxheads.spec import ExportOutput, merged_signatures

WEIGHTINGS = ("fixed", "uncertainty")
RESERVED = ("serving_default", "predict")


class MultiHead(AbstractCompositeHead):
    """Several heads on one network: multi-task learning.

    The inputs and outputs of the heads are dicts by the heads' names. Heads may be of any kind, also heads that learn
    and other `MultiHead`s.

    **Domain**: `labels` is a dict by head, with labels as each head takes them. `logits` is a dict by head, or one
    array (or `LinearLogits`) `[D0, ..., DN, logits_dimension]`, which is split in the order of the heads. `weights`,
    `where` and `normalizer` are one value for all, or a dict by head (heads not in it get none): so each task has its
    own missing labels. `keys` of predictions likewise, but heads that are not in a dict predict nothing.

    **Link**: that of each head.

    **loss** = `sum_k w_k loss_k`, with each head's loss under its own reduction and w the `head_weights`. With
    `weighting="uncertainty"` it is `sum_k exp(-s_k) w_k loss_k + s_k / 2`, with a learned s_k for each head (Kendall,
    Gal and Cipolla 2018), kept within 20 of 0. The last term is left out for a head of weight 0 or without labels in
    the batch. This loss may be negative. The losses inside may not: a head under constraints is refused, and so is a
    `MultiHead` with this weighting.

    **Predictions**: a dict by head.
    **Metrics**: those of each head, `auc/NAME`, and `loss/NAME`, the loss of all data seen under that head's reduction
    (without head weights); `regularization_loss/A_B` if a regularization is given.

    Args:
        heads: heads with names, all different.
        head_weights: a number for each head; 1 by default.
        weighting: `"fixed"` or `"uncertainty"`.

    Raises:
        ValueError: no heads, heads without a name or with equal names, metric keys that collide; `head_weights` of
            another length; dicts that lack a head; one array of another size.

    Source: `tf.estimator.MultiHead` (TensorFlow 2.15); uncertainty weighting by Kendall et al., CVPR 2018.

    >>> import jax.numpy as jnp
    >>> import jaxheads as jh
    >>> late, minutes = jh.BinaryClassHead(name="late"), jh.RegressionHead(name="minutes")
    >>> head = jh.MultiHead([late, minutes], head_weights=[1.0, 0.5])
    >>> labels = {"late": jnp.array([1, 0]), "minutes": jnp.array([3.0, jnp.nan])}
    >>> where = {"minutes": jnp.array([True, False])}
    >>> logits = jnp.array([[0.0, 1.0], [0.0, 2.0]])
    >>> float(head.loss(labels=labels, logits=logits, where=where))  # ln 2 + 0.5 (3 - 1)^2
    2.6931...
    >>> values = head.measure(labels=labels, logits=logits, where=where).compute()
    >>> values["loss/minutes"], values["accuracy/late"]
    (np.float32(4.0), np.float32(0.5))

    The original's documented example:

    >>> head = jh.MultiHead([jh.MultiLabelHead(2, name="head1"), jh.MultiLabelHead(3, name="head2")])
    >>> labels = {"head1": jnp.array([[1, 0], [1, 1]]), "head2": jnp.array([[0, 1, 0], [1, 1, 0]])}
    >>> logits = jnp.array([[-10.0, 10.0, 20.0, -20.0, 20.0], [-15.0, 10.0, -30.0, 20.0, -20.0]])
    >>> print(f"{head.loss(labels=labels, logits=logits):.2f}")
    23.75
    >>> values = head.measure(labels=labels, logits=logits).compute()
    >>> print(f"{values['loss/head1']:.2f} + {values['loss/head2']:.2f}")
    8.75 + 15.00
    """

    heads: Sequence[Head] = subheads()
    head_weights: Sequence[float] | None = None
    weighting: str = "fixed"
    log_variances: jax.Array | None = learned(
        lambda head, key: jnp.zeros(len(head.heads), jnp.float32) if head.weighting == "uncertainty" else None
    )

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]  # made of the heads' names
        """The names of the heads, joined."""
        return "_".join(self._by_name)

    @property
    def _by_name(self) -> dict[str, Head]:
        return {str(head.name): head for head in self.heads}

    @property
    def loss_reduction(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]  # the heads'
        """The reduction of all heads, if they have the same."""
        found = [head.loss_reduction for head in self.heads]
        if len(set(found)) > 1:
            raise ValueError(
                f"The loss_reduction must be the same for different heads to be one of the MultiHead. Given: {found}."
            )
        return found[0]

    @property
    def slices(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]  # the heads'
        """The slices of all heads."""
        return self.heads[0].slices

    @property
    def bootstrap(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]  # the heads'
        """The bootstrap of all heads."""
        return self.heads[0].bootstrap

    @property
    def logits_dimension(self) -> int:
        return sum(head.logits_dimension for head in self.heads)

    @property
    def label_spec(self) -> Any:
        return {name: head.label_spec for name, head in self._by_name.items()}

    def validate(self) -> None:
        if not isinstance(self.heads, tuple) or not self.heads:
            raise ValueError(f"Must specify heads, a list of them. Given: {self.heads!r}.")
        names = [head.name for head in self.heads]
        if not all(names):
            unnamed = next(head for head in self.heads if not head.name)
            raise ValueError(f"All given heads must have name specified. Given: {unnamed!r}. Pass name= to it.")
        if reserved := [name for name in names if "/" in str(name) or name in RESERVED]:
            raise ValueError(
                f"Names of heads in a MultiHead must not hold a slash or be one of {RESERVED}: those are keys of "
                f"metrics and exports. Given {reserved}."
            )
        if len(set(names)) < len(names):
            raise ValueError(f"Heads of a MultiHead must have different names. Given: {names}.")
        slices, bootstraps = {head.slices for head in self.heads}, {head.bootstrap for head in self.heads}
        for what, found in (("slices", slices), ("bootstrap", bootstraps)):
            if len(found) > 1:
                raise ValueError(
                    f"Heads of a MultiHead must have the same {what}, or none. Given {sorted(map(repr, found))}."
                )
        if not isinstance(self.head_weights, (tuple, type(None))):
            raise ValueError(f"head_weights must be a list of numbers, one for each head. Given {self.head_weights!r}.")
        weights = self.head_weights or ()
        if weights and len(weights) != len(self.heads):
            raise ValueError(
                f"heads and head_weights must have the same size. Given len(heads): {len(self.heads)}. Given "
                f"len(head_weights): {len(weights)}."
            )
        if not all(isinstance(w, (int, float)) and np.isfinite(w) for w in weights):
            raise ValueError(f"head_weights must be finite numbers. Given {self.head_weights!r}.")
        object.__setattr__(self, "head_weights", weights or None)
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"weighting must be one of {WEIGHTINGS}. Given {self.weighting!r}.")
        if self.weighting == "uncertainty" and (signed := [str(head.name) for head in self.heads if head.signed]):
            raise ValueError(
                "weighting='uncertainty' takes losses that are not negative: the weight of one below 0 would rise "
                f"without end. Given heads under constraints, or weighted by uncertainty themselves: {signed}. Use "
                "fixed head_weights."
            )
        keys = [join_names(LOSS, name) for name in names]
        keys += [key for head in self.heads for key in metric_names(fields.unbound(head))]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise ValueError(f"Metric keys of these heads collide: {twice}. Give the heads of {names} other names.")

    # The hooks of a head made of heads, for the engine.

    def parts(self) -> dict[str, Head]:
        return self._by_name

    @property
    def silent(self) -> frozenset[str]:
        """The heads of weight 0. They are hidden like an element of weight 0, with any NaN in loss or gradient."""
        return frozenset(name for name, weight in self._weights.items() if weight == 0)

    @property
    def signed(self) -> bool:
        return self.weighting == "uncertainty" or any(head.signed for head in self.heads)

    @property
    def _weights(self) -> dict[str, float]:
        return dict(zip(self._by_name, self.head_weights or (1.0,) * len(self.heads), strict=True))

    def route(self, given: Given) -> dict[str, Given]:
        names = [*self._by_name]
        asked = [name for name in names if not isinstance(given.keys, Mapping) or name in given.keys]
        parts = {name: given for name in names}
        if given.logits is not ABSENT:
            split = self._split(given.logits, asked)
            parts = {name: given.replace(logits=split[name]) for name in asked}
        if given.labels is not ABSENT:
            labels = _of_each(given.labels, "labels", names)
            parts = {name: part.replace(labels=labels[name]) for name, part in parts.items()}
        weights, where = self._by_head(given.weights, "weights"), self._by_head(given.where, "where")
        normalizer, keys = self._by_head(given.normalizer, "normalizer"), self._by_head(given.keys, "keys")
        return {
            name: part.replace(weights=weights[name], where=where[name], normalizer=normalizer[name], keys=keys[name])
            for name, part in parts.items()
        }

    def combine(self, losses: Mapping[str, Any], shares: Mapping[str, Any]) -> Any:
        total, weights = None, self._weights
        for i, name in enumerate(self._by_name):
            if name not in losses:
                continue
            own = weights[name] * losses[name]
            if self.log_variances is not None:
                s = self.log_variances[i]
                # This clip passes the gradient on, so that an s beyond the limits can come back.
                s = s + jax.lax.stop_gradient(jnp.clip(s, -20, 20) - s)
                own = jnp.exp(-s) * own + shares[name] * s / 2
            total = own if total is None else total + own
        return total

    def _by_head(self, value: Any, what: str) -> dict[str, Any]:
        """Returns a dict by head, from one value for all heads or from such a dict."""
        if not isinstance(value, Mapping):
            return dict.fromkeys(self._by_name, value)
        if unknown := [key for key in value if key not in self._by_name]:
            raise ValueError(f"{what} given for heads that are not there: {unknown}. The heads are {[*self._by_name]}.")
        return {name: value.get(name) for name in self._by_name}

    def _split(self, logits: Any, asked: Sequence[str]) -> dict[str, Any]:
        """Returns the logits of the heads that are asked for, from a dict or one array."""
        if isinstance(logits, Mapping):
            return _of_each(logits, "logits", asked)
        sizes = [head.logits_dimension for head in self.heads]
        if isinstance(logits, LinearLogits):
            logits.check()
        else:
            logits = inputs.as_numbers(logits, "logits")
        shape = tuple(logits.shape)
        if len(shape) < 2 or shape[-1] != sum(sizes):
            raise ValueError(
                f"Could not split logits of shape {shape} among the heads with individual logits dimensions: "
                f"{sizes}. The last dimension of the logits tensor should equal {sum(sizes)} but is "
                f"{shape[-1] if shape else None}, and the rank must be at least 2. A dict by head is taken too."
            )
        stops = np.cumsum(sizes)
        every = zip(self._by_name, sizes, stops.tolist(), strict=True)
        columns = {name: (stop - size, stop) for name, size, stop in every if name in asked}
        if isinstance(logits, LinearLogits):
            return {name: logits.columns(start, stop) for name, (start, stop) in columns.items()}
        return {name: logits[..., start:stop] for name, (start, stop) in columns.items()}

    # The methods for users.

    def losses(self, labels: Any, logits: Any) -> Any:
        """Returns the per-element losses of each head, by name."""
        split = self._split(logits, [*self._by_name])
        return {name: head.losses(labels[name], split[name]) for name, head in self._by_name.items()}

    def outputs(self, logits: Any) -> dict[str, Any]:
        split = self._split(logits, [*self._by_name])
        return {name: head.outputs(split[name]) for name, head in self._by_name.items()}

    def encode_labels(self, labels: Any, where: Any = None) -> Any:
        """Encodes each head's labels with that head; `where` is one mask for all heads, or a dict by head."""
        where, labels = self._by_head(where, "where"), _of_each(labels, "labels", [*self._by_name])
        return trees.each(self, lambda head, own, mask: head.encode_labels(own, mask), labels, where)

    def decode_predictions(self, predictions: Mapping[str, Any]) -> dict[str, Any]:
        """Decodes each head's predictions with that head."""
        return {name: self._by_name[name].decode_predictions(value) for name, value in predictions.items()}

    def signatures(self, predictions: Mapping[str, Any]) -> dict[str, ExportOutput]:
        return merged_signatures({name: head.signatures(predictions[name]) for name, head in self._by_name.items()})


def _of_each(value: Any, what: str, asked: Sequence[str]) -> dict[str, Any]:
    """Returns the values of the heads that are asked for, from a dict by head."""
    if not isinstance(value, Mapping):
        raise ValueError(f"You must provide {what}: {what} must be a dict by head, {[*asked]}. Given: {value!r}.")
    if missing := [name for name in asked if name not in value]:
        raise ValueError(f"{what} has missing values for head(s): {missing}. Given {sorted(map(str, value))}.")
    return {name: value[name] for name in asked}

"""Several tasks on one network."""

import collections
import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.compose import _splitting
from jaxheads.compose._abstract import AbstractCompositeHead
from jaxheads.contract import Given, learned, subheads
from jaxheads.engine import trees
from jaxheads.head import Head
from jaxheads.metrics.base import LOSS, join_names
from jaxheads.metrics.state import metric_names
from jaxheads.numerics import brief, fields
from jaxheads.numerics.batch import ABSENT
from jaxheads.spec import ExportOutput, merged_signatures

WEIGHTINGS = ("fixed", "uncertainty")
RESERVED = ("serving_default", "predict")


class MultiHead(AbstractCompositeHead):
    """Several heads on one network: multi-task learning.

    The inputs and outputs of the heads are dicts by the heads' names. Every kind of head is allowed, also heads that
    learn and other `MultiHead`s.

    Many heads that are equal but for their names (16 or more) are compiled as one program, with a loop over the heads.

    **Domain**: `labels` is a dict by head, with labels as each head takes them. `logits` is a dict by head, or one
    array (or `LinearLogits`) `[D0, ..., DN, logits_dimension]`, which is split in the order of the heads. `weights`,
    `where` and `normalizer` are one value for all heads, or a dict by head: so each task has its own missing labels. A
    head that is not in such a dict gets None. `keys` of predictions likewise, but a head that is not in the dict
    predicts nothing.

    **Link**: the link of each head.

    **loss** = `sum_k w_k loss_k`: each head reduces its own loss, and w are the `head_weights`. With
    `weighting="uncertainty"` it is `sum_k exp(-s_k) w_k loss_k + s_k / 2`, with a learned s_k for each head (Kendall,
    Gal and Cipolla 2018), kept within 20 of 0. A head of weight 0, or without labels in the batch, has no last term.
    This loss may be negative. The losses of the heads may not: the weighting refuses heads under constraints, and
    `MultiHead`s with this weighting.

    **Predictions**: a dict by head.
    **Metrics**: the metrics of each head, `auc/NAME`, and `loss/NAME`, its loss of all data seen, without head weights;
    `regularization_loss/A_B` if a regularization is given.

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
    >>> logits = jnp.array([[1.0, 1.0], [-1.0, 2.0]])
    >>> float(head.loss(labels=labels, logits=logits, where=where))  # ln(1 + exp(-1)) + 0.5 (3 - 1)^2
    2.3132...
    >>> values = head.measure(labels=labels, logits=logits, where=where).compute()
    >>> values["loss/minutes"], values["accuracy/late"]
    (4.0, 1.0)

    The original's documented example:

    >>> head = jh.MultiHead([jh.MultiLabelHead(2, name="head1"), jh.MultiLabelHead(3, name="head2")])
    >>> labels = {"head1": jnp.array([[1, 0], [1, 1]]), "head2": jnp.array([[0, 1, 0], [1, 1, 0]])}
    >>> logits = jnp.array([[-10.0, 10.0, 20.0, -20.0, 20.0], [-15.0, 10.0, -30.0, 20.0, -20.0]])
    >>> print(f"{head.loss(labels=labels, logits=logits):.2f}")
    23.75
    >>> values = head.measure(labels=labels, logits=logits).compute(warn=False)  # two rows make no curve
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
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]  # no argument here
        """The names of the heads, joined."""
        return "_".join(self.parts())

    @property
    def loss_reduction(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]  # no argument here
        """The reduction of all heads, if they have the same."""
        found = [head.loss_reduction for head in self.heads]
        if len(set(found)) > 1:
            raise ValueError(
                f"The loss_reduction must be the same for different heads to be one of the MultiHead. Given: {found}."
            )
        return found[0]

    @property
    def first(self) -> Head:
        return self.heads[0]

    @property
    def logits_dimension(self) -> int:
        return sum(head.logits_dimension for head in self.heads)

    @property
    def label_spec(self) -> Any:
        return {name: head.label_spec for name, head in self.parts().items()}

    def validate(self) -> None:
        if not isinstance(self.heads, tuple) or not self.heads:
            raise ValueError(f"Must specify heads, a list of them. Given: {self.heads!r}.")
        if unnamed := [head for head in self.heads if not head.name]:
            raise ValueError(f"All given heads must have name specified. Given: {unnamed[0]!r}. Pass name= to it.")
        names = [str(head.name) for head in self.heads]
        if reserved := [name for name in names if "/" in name or name in RESERVED]:
            raise ValueError(
                f"Names of heads in a MultiHead must not hold a slash or be one of {RESERVED}: those are keys of "
                f"metrics and exports. Given {reserved}."
            )
        slices, bootstraps = {head.slices for head in self.heads}, {head.bootstrap for head in self.heads}
        for what, found in (("slices", slices), ("bootstrap", bootstraps)):
            if len(found) > 1:
                raise ValueError(
                    f"Heads of a MultiHead must have the same {what}, or none. Given {sorted(map(repr, found))}."
                )
        self._check_weights()
        keys = [join_names(LOSS, name) for name in names]
        keys += [key for head in self.heads for key in metric_names(fields.unbound(head))]
        if twice := sorted(key for key, n in collections.Counter(keys).items() if n > 1):
            raise ValueError(f"Metric keys of these heads collide: {twice}. Give the heads of {names} other names.")

    def _check_weights(self) -> None:
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
        if not brief.is_one_of(self.weighting, WEIGHTINGS):
            raise ValueError(f"weighting must be one of {WEIGHTINGS}. Given {self.weighting!r}.")
        if self.weighting == "uncertainty" and (signed := [str(head.name) for head in self.heads if head.signed]):
            raise ValueError(
                "weighting='uncertainty' takes losses that are not negative: the weight of one below 0 would rise "
                f"without end. Given heads under constraints, or weighted by uncertainty themselves: {signed}. Use "
                "fixed head_weights."
            )

    # The hooks of a head made of heads, for the engine.

    def parts(self) -> dict[str, Head]:
        return {str(head.name): head for head in self.heads}

    @property
    def silent(self) -> frozenset[str]:
        """The heads of weight 0. They are hidden like an element of weight 0, with any NaN in loss or gradient."""
        return frozenset(name for name, weight in self._weights.items() if weight == 0)

    @property
    def signed(self) -> bool:
        return self.weighting == "uncertainty" or any(head.signed for head in self.heads)

    @property
    def _sizes(self) -> dict[str, int]:
        return {name: head.logits_dimension for name, head in self.parts().items()}

    @property
    def _weights(self) -> dict[str, float]:
        return dict(zip(self.parts(), self.head_weights or (1.0,) * len(self.heads), strict=True))

    def route(self, given: Given) -> dict[str, Given]:
        names = [*self.parts()]
        parts = dict.fromkeys(names, given)
        if given.logits is not ABSENT:
            asked = [name for name in names if not isinstance(given.keys, Mapping) or name in given.keys]
            parts = {
                name: given.replace(logits=x)
                for name, x in _splitting.split_logits(self._sizes, given.logits, asked).items()
            }
        if given.labels is not ABSENT:
            labels = _splitting.select(given.labels, "labels", names)
            parts = {name: part.replace(labels=labels[name]) for name, part in parts.items()}
        weights, where = self._spread(given.weights, "weights"), self._spread(given.where, "where")
        normalizer, keys = self._spread(given.normalizer, "normalizer"), self._spread(given.keys, "keys")
        return {
            name: part.replace(weights=weights[name], where=where[name], normalizer=normalizer[name], keys=keys[name])
            for name, part in parts.items()
        }

    def combine(self, losses: Mapping[str, Any], shares: Mapping[str, Any]) -> Any:
        terms = []
        for i, (name, weight) in enumerate(self._weights.items()):
            if name not in losses:
                continue
            term = weight * losses[name]
            if self.log_variances is not None:
                s = self.log_variances[i]
                # This clip passes the gradient on, so that an s beyond the limits can come back.
                s = s + jax.lax.stop_gradient(jnp.clip(s, -20, 20) - s)
                term = jnp.exp(-s) * term + shares[name] * s / 2
            terms.append(term)
        return functools.reduce(operator.add, terms)

    def _spread(self, value: Any, what: str) -> dict[str, Any]:
        """Returns a dict by head, from one value for all heads or from such a dict."""
        names = [*self.parts()]
        if not isinstance(value, Mapping):
            return dict.fromkeys(names, value)
        if unknown := [key for key in value if key not in names]:
            raise ValueError(f"{what} given for heads that are not there: {unknown}. The heads are {names}.")
        return {name: value.get(name) for name in names}

    # The methods for users.

    def losses(self, labels: Any, logits: Any) -> Any:
        """Returns the per-element losses of each head, by name."""
        logits = _splitting.split_logits(self._sizes, logits, [*self.parts()])
        return {name: head.losses(labels[name], logits[name]) for name, head in self.parts().items()}

    def outputs(self, logits: Any) -> dict[str, Any]:
        logits = _splitting.split_logits(self._sizes, logits, [*self.parts()])
        return {name: head.outputs(logits[name]) for name, head in self.parts().items()}

    def encode_labels(self, labels: Any, where: Any = None) -> Any:
        """Encodes each head's labels with that head; `where` is one mask for all heads, or a dict by head."""
        masks, labels = self._spread(where, "where"), _splitting.select(labels, "labels", [*self.parts()])
        return trees.each(self, lambda head, labels, mask: head.encode_labels(labels, mask), labels, masks)

    def decode_predictions(self, predictions: Mapping[str, Any]) -> dict[str, Any]:
        """Decodes each head's predictions with that head."""
        inside = self.parts()
        return {name: inside[name].decode_predictions(value) for name, value in predictions.items()}

    def signatures(self, predictions: Mapping[str, Any]) -> dict[str, ExportOutput]:
        return merged_signatures({name: head.signatures(predictions[name]) for name, head in self.parts().items()})

"""Several tasks on one network."""

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.compose._abstract import AbstractCompositeHead, AbstractWrapperHead
from jaxheads.compose.global_objective import GlobalObjectiveHead
from jaxheads.head import DIVISOR, Head, LinearLogits, learned, subheads
from jaxheads.metrics import Observation, Total
from jaxheads.metrics.state import joined, metric_names
from jaxheads.numerics import fields, inputs, reduction
from jaxheads.spec import ExportOutput, merged_signatures

WEIGHTINGS = ("fixed", "uncertainty")
RESERVED = ("serving_default", "predict")


class MultiHead(AbstractCompositeHead):
    """Several heads on one network: multi-task learning.

    What each head takes and gives is a dict by the heads' names. Heads may be of any kind, heads that learn and
    `MultiHead`s among them.

    **Domain**: `labels` a dict by head, each as its head wants them. `logits` a dict by head, or one array (or
    `LinearLogits`) `[D0, ..., DN, logits_dimension]` that is split in the order of the heads. `weights`, `where` and
    `normalizer` one value for all, or a dict by head (none for heads that are not in it): so each task has missing
    labels of its own. `keys` of predictions likewise, but heads that are not in a dict predict nothing.

    **Link**: that of each head.

    **loss** = `sum_k w_k loss_k`, each head's loss under its own reduction, w the `head_weights`. With
    `weighting="uncertainty"`, `sum_k exp(-s_k) w_k loss_k + s_k / 2` with a learned s_k for each head (Kendall, Gal and
    Cipolla 2018), kept within 20 of 0; without the last term for a head whose weight is 0 or that has no labels in the
    batch. This loss may be negative. For losses that are not: a head under constraints is refused, and one that is
    weighted so itself.

    **Predictions**: a dict by head.
    **Metrics**: those of each head, `auc/NAME`, and `loss/NAME`, the loss of all data seen under that head's reduction
    (head weights not applied); `regularization_loss/A_B` if one is given.

    Args:
        heads: heads with names, all different.
        head_weights: a number for each head; 1 by default.
        weighting: `"fixed"` or `"uncertainty"`.

    Raises:
        ValueError: no heads, heads without a name or of equal names, metric keys that collide; weights of another
            length; dicts without a head; one array of another size.

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
    def logits_dimension(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]  # see Head
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
        for what in ("slices", "bootstrap"):
            if len(found := {getattr(head, what) for head in self.heads}) > 1:
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
        if self.weighting == "uncertainty" and (signed := [str(head.name) for head in self.heads if _is_signed(head)]):
            raise ValueError(
                "weighting='uncertainty' takes losses that are not negative: the weight of one below 0 would rise "
                f"without end. Given heads under constraints, or weighted by uncertainty themselves: {signed}. Use "
                "fixed head_weights."
            )
        keys = [f"loss/{name}" for name in names]
        keys += [key for head in self.heads for key in metric_names(fields.unbound(head))]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise ValueError(f"Metric keys of these heads collide: {twice}. Give the heads of {names} other names.")

    # What each head is given.

    def _named(self, value: Any, what: str) -> dict[str, Any]:
        """One value for all heads, or a dict by head."""
        if not isinstance(value, Mapping):
            return dict.fromkeys(self._by_name, value)
        if unknown := [key for key in value if key not in self._by_name]:
            raise ValueError(f"{what} given for heads that are not there: {unknown}. The heads are {[*self._by_name]}.")
        return {name: value.get(name) for name in self._by_name}

    def _every(self, value: Any, what: str, asked: Sequence[str]) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise ValueError(f"You must provide {what}: {what} must be a dict by head, {[*asked]}. Given: {value!r}.")
        if missing := [name for name in asked if name not in value]:
            raise ValueError(f"{what} has missing values for head(s): {missing}. Given {sorted(map(str, value))}.")
        return {name: value[name] for name in asked}

    def _split(self, logits: Any, asked: Sequence[str]) -> dict[str, Any]:
        """The logits of the heads that are asked for, from a dict or one array."""
        if isinstance(logits, Mapping):
            return self._every(logits, "logits", asked)
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
        return {name: _columns(logits, stop - size, stop) for name, size, stop in every if name in asked}

    def _gather(
        self, labels: Any, logits: Any, features: Any, weights: Any, where: Any, check: bool | None
    ) -> dict[str, Any]:
        split, labels = self._split(logits, [*self._by_name]), self._every(labels, "labels", [*self._by_name])
        weights, where = self._named(weights, "weights"), self._named(where, "where")
        gathered = {}
        for name, head in self._by_name.items():
            with naming(name):
                gathered[name] = head._gather(labels[name], split[name], features, weights[name], where[name], check)
        return {"heads": gathered}

    def encode_labels(self, labels: Any, where: Any = None) -> Any:
        """Each head's labels, encoded by it; `where` for all, or by head."""
        where, labels = self._named(where, "where"), self._every(labels, "labels", [*self._by_name])
        encoded = {}
        for name, head in self._by_name.items():
            with naming(name):
                encoded[name] = head.encode_labels(labels[name], where[name])
        return encoded

    # Where training starts.

    def _zero_logits(self, labels: Any) -> dict[str, Any]:
        labels, zeros = self._every(labels, "labels", [*self._by_name]), {}
        for name, head in self._by_name.items():
            with naming(name):
                zeros[name] = head._zero_logits(labels[name])
        return zeros

    def _constants(self, batch: dict[str, Any]) -> np.ndarray:
        each = []
        for name, head in self._by_name.items():
            with naming(name):
                each.append(head._constants(batch["heads"][name]))
        return np.concatenate(each)

    # Loss.

    def losses(self, labels: Any, logits: Any) -> Any:
        """The per-element losses of each head, by name."""
        split = self._split(logits, [*self._by_name])
        return {name: head.losses(labels[name], split[name]) for name, head in self._by_name.items()}

    @property
    def _loss_size(self) -> int:
        return sum(head._loss_size for head in self.heads)

    def _loss_sums(self, batch: dict[str, Any], axis_name: Any) -> jax.Array:
        sums = []
        for i, (name, head) in enumerate(self._by_name.items()):
            # A weight of 0 hides a head, as it hides an element: even a NaN, and in the gradient too.
            hidden = self.head_weights is not None and self.head_weights[i] == 0
            zeros = jnp.zeros(head._loss_size, jnp.float32)
            sums.append(zeros if hidden else head._loss_sums(batch["heads"][name], axis_name))
        return jnp.concatenate(sums)

    def _normalizer(self, normalizer: Any) -> Any:
        by_head = self._named(normalizer, "normalizer")
        return {name: head._normalizer(by_head[name]) for name, head in self._by_name.items()}

    def _parts(self, sums: jax.Array, normalizer: Any) -> Iterator[tuple[Head, jax.Array, Any]]:
        """Each head with its loss sums and its normalizer."""
        normalizers, start = self._named(normalizer, "normalizer"), 0
        for name, head in self._by_name.items():
            yield head, sums[start : start + head._loss_size], normalizers[name]
            start += head._loss_size

    def _loss_of(self, sums: jax.Array, normalizer: Any) -> jax.Array:
        losses = [
            self._weighted(i, head._loss_of(part, by), head._share(part, by)[0])
            for i, (head, part, by) in enumerate(self._parts(sums, normalizer))
        ]
        return functools.reduce(jnp.add, losses)

    def _weighted(self, i: int, loss: jax.Array, share: jax.Array) -> jax.Array:
        weight = self.head_weights[i] if self.head_weights else 1.0
        if self.log_variances is None:
            return weight * loss
        s = self.log_variances[i]
        # A clip that passes the gradient on: an s that has overshot comes back.
        s = s + jax.lax.stop_gradient(jnp.clip(s, -20, 20) - s)
        return jnp.exp(-s) * weight * loss + share * s / 2

    def _share(self, sums: jax.Array, normalizer: Any) -> tuple[jax.Array, jax.Array]:
        each = [head._share(part, by) for head, part, by in self._parts(sums, normalizer)]
        shares, live = (jnp.stack(column) for column in zip(*each, strict=True))
        return reduction.divide(jnp.sum(shares), jnp.sum(live.astype(jnp.float32))), jnp.any(live)

    def _divisor_of(self, sums: jax.Array) -> dict[str, Any]:
        return {str(head.name): head._divisor_of(part) for head, part, _ in self._parts(sums, None)}

    def _summaries(self, loss: jax.Array, sums: jax.Array, regularization: Any) -> dict[str, jax.Array]:
        """The loss, then that of each head under its name, as in the original."""
        out = {"loss": loss}
        for head, part, _ in self._parts(sums, None):
            own = head._loss_of(part, None)
            out |= {**head._summaries(own, part, None), joined("loss", head.name): own}
            out["loss"] = loss
        return out if regularization is None else {**out, "regularization_loss": regularization}

    # Metrics.

    def observed(self) -> dict[str, Observation]:
        """Those of all heads, each with what its loss is divided by."""
        out: dict[str, Observation] = {}
        for name, head in self._by_name.items():
            out |= {f"{name}/{key}": observation for key, observation in head.observed().items()}
            if head._has_divisor:
                out[f"{name}/{DIVISOR}"] = head._in_groups(Total())
        return out

    @property
    def _has_divisor(self) -> bool:
        return False

    def _all_sums(self, batch: dict[str, Any], with_divisor: bool = False) -> list[jax.Array]:
        each = [head._all_sums(batch["heads"][name], head._has_divisor) for name, head in self._by_name.items()]
        return [functools.reduce(jnp.add, (sums[0] for sums in each)), *(part for sums in each for part in sums[1:])]

    def _grouped(self, batch: dict[str, Any], features: Any, key: Any, check: bool | None) -> dict[str, Any]:
        for name, head in self._by_name.items():
            with naming(name):
                # The same key for all: a replica counts a row as often for every task.
                batch["heads"][name] = head._grouped(batch["heads"][name], features, key, check)
        return batch

    def _views(self, seen: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """What each head has seen."""
        return {
            name: {key.removeprefix(f"{name}/"): view for key, view in seen.items() if key.startswith(f"{name}/")}
            for name in self._by_name
        }

    def read(self, seen: Mapping[str, Any]) -> dict[tuple[str, str | None], Any]:
        """The loss of each head, then its metrics."""
        views, out = self._views(seen), {}
        for name, head in self._by_name.items():
            out["loss", name] = head.read_loss(views[name])
        for name, head in self._by_name.items():
            out |= head.read({key: view for key, view in views[name].items() if key != DIVISOR})
        return out

    def _counting(self, seen: Mapping[str, Any]) -> list[tuple[float, Head, dict[str, Any]]]:
        """The heads whose weight is not 0, with it and what they have seen."""
        views, weights = self._views(seen), self.head_weights or (1.0,) * len(self.heads)
        every = zip(weights, self._by_name.items(), strict=True)
        return [(weight, head, views[name]) for weight, (name, head) in every if weight != 0]

    def read_loss(self, seen: Mapping[str, Any]) -> Any:
        """The sum of the heads' losses by `head_weights`, of those that saw data; learned weights are not applied."""
        view, total = next(iter(seen.values())), 0.0
        for weight, head, views in self._counting(seen):
            loss = head.read_loss(views)
            total = total + view.xp.where(head.was_seen(views), weight * loss, view.xp.zeros_like(loss))
        return view.xp.where(self.was_seen(seen), total, view.xp.full_like(total, view.undefined))

    def was_seen(self, seen: Mapping[str, Any]) -> Any:
        """Whether any head that counts has seen anything."""
        found = (head.was_seen(views) for _, head, views in self._counting(seen))
        return functools.reduce(operator.or_, found, False)

    # What goes out.

    def outputs(self, logits: Any) -> dict[str, Any]:
        split = self._split(logits, [*self._by_name])
        return {name: head.outputs(split[name]) for name, head in self._by_name.items()}

    def _predict(self, logits: Any, keys: Any) -> dict[str, Any]:
        by_head = self._named(keys, "keys")
        asked = [name for name in self._by_name if not isinstance(keys, Mapping) or name in keys]
        split = self._split(logits, asked)
        predicted = {}
        for name in asked:
            with naming(name):
                predicted[name] = self._by_name[name]._predict(split[name], by_head[name])
        return predicted

    def decode_predictions(self, predictions: Mapping[str, Any]) -> dict[str, Any]:
        """Each head's predictions, decoded by it."""
        return {name: self._by_name[name].decode_predictions(value) for name, value in predictions.items()}

    def signatures(self, predictions: Mapping[str, Any]) -> dict[str, ExportOutput]:
        return merged_signatures({name: head.signatures(predictions[name]) for name, head in self._by_name.items()})

    def _advance(self, batch: dict[str, Any], psum: Callable[[Any], Any]) -> dict[str, Any]:
        new = {name: head._advance(batch["heads"][name], psum) for name, head in self._by_name.items()}
        return {name: value for name, value in new.items() if fields.has_state(self._by_name[name])}


def _is_signed(head: Any) -> bool:
    """Whether a head's loss is a Lagrangian, or holds logarithms of weights, or adds up from such."""
    if isinstance(head, GlobalObjectiveHead):
        return not head.is_of_pairs
    if isinstance(head, MultiHead) and head.weighting == "uncertainty":
        return True
    inside = (head.wrapped,) if isinstance(head, AbstractWrapperHead) else getattr(head, "heads", ())
    return any(map(_is_signed, inside))


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Says which head refuses."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"Head {name!r}: {error}") from error


def _columns(logits: Any, start: int, stop: int) -> Any:
    """Some columns of logits, multiplied out or not."""
    if not isinstance(logits, LinearLogits):
        return logits[..., start:stop]
    bias = None if logits.bias is None else logits.bias[start:stop]
    return LinearLogits(logits.hidden, logits.kernel[:, start:stop], bias)

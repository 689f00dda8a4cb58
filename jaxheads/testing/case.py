"""A head with a few rows, and the one program that most laws run."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.contract import AbstractHead
from jaxheads.engine import trees
from jaxheads.engine.samplers import sample_labels, sample_logits
from jaxheads.head import Head
from jaxheads.metrics import Metrics
from jaxheads.numerics import fields
from jaxheads.numerics.reduction import Reduction


class Skipped(Exception):
    """Raised where a law does not apply; the message says why."""


@dataclasses.dataclass(frozen=True)
class Values:
    """The results of a head for a batch.

    Attributes:
        loss: the loss under the head's own reduction.
        by_logits, by_params: the gradients of the loss.
        losses: the loss under each reduction, by its text; empty if the heads inside have the reductions.
        metrics: the metrics of the batch.
    """

    loss: Any
    by_logits: Any
    by_params: Any
    losses: dict[str, Any]
    metrics: Metrics


jax.tree_util.register_dataclass(Values, [field.name for field in dataclasses.fields(Values)], [])


@dataclasses.dataclass(frozen=True)
class Case:
    """A head and rows for it.

    Attributes:
        head: the head, unbound.
        params: values of its learned and running fields.
        labels, logits, features: values for `size` rows.
        size: the number of rows.
        tail: leading axes behind the rows: the steps, for a head of sequences.
    """

    head: Head
    params: dict[str, Any]
    labels: Any
    logits: Any
    features: Any
    size: int
    tail: tuple[int, ...] = ()

    @classmethod
    def of(cls, head: Head, labels: Any, features: Any, size: int) -> "Case":
        """Draws rows for a head; for a head of sequences, sequences of three steps."""
        rng = np.random.default_rng(0)
        params = fields.merge(head.init(jax.random.key(0)), head.init_state())
        tail = (3,) if _is_of_sequences(head) else ()
        lead = (size, *tail)
        drawn = sample_labels(head, rng, lead) if labels is None else labels(rng, lead)
        logits = sample_logits(head, rng, lead)
        return cls(head, params, drawn, logits, features and features(rng, lead), size, tail)

    def spread(self, rows: Any, dtype: Any) -> np.ndarray:
        """Repeats one value per row for each of the row's steps: `[size, ..., 1]`."""
        rows = np.asarray(rows, dtype).reshape(-1, *[1] * (len(self.tail) + 1))
        return np.broadcast_to(rows, (len(rows), *self.tail, 1))

    @property
    def key(self) -> Any:
        """A random key, where a head inside needs one."""
        needed = any(leaf.samples or leaf.bootstrap is not None for leaf in self.leaves)
        return jax.random.key(0) if needed else None

    def check_not_random(self) -> None:
        """Skips a law that compares these rows with other rows, if the head samples: its draws would differ."""
        if any(leaf.samples for leaf in self.leaves):
            raise Skipped("it draws at random")

    def rows(self, chosen: Any) -> "Case":
        """Returns the case with some of its rows, or with some of them repeated."""
        labels, logits, features = jax.tree.map(
            lambda x: np.asarray(x)[chosen], (self.labels, self.logits, self.features)
        )
        return dataclasses.replace(self, labels=labels, logits=logits, features=features, size=len(chosen))

    @property
    def leaves(self) -> list[AbstractHead]:
        """The heads without heads inside, which have their own losses."""
        return trees.leaves(self.head)

    @property
    def is_coupled(self) -> bool:
        """Whether rows depend on each other."""
        return any(leaf.coupling == "batch" for leaf in self.leaves)

    def scaled(self, scale: float) -> "Case":
        """Returns the case with logits of another size."""
        return dataclasses.replace(self, logits=jax.tree.map(lambda x: np.float32(scale) * x, self.logits))

    def predictions(self, logits: Any = None) -> tuple[Any, dict[str, Any]]:
        """Returns compiled predictions, all of them and each alone."""
        logits = self.logits if logits is None else logits
        return predictor(self.head)(logits, self.features, self.params, self.key)

    def values(
        self, weights: Any = None, where: Any = None, scale: float = 1.0, logits: Any = None, lead: Any = None
    ) -> Values:
        """Returns the head's results for these rows, from one compiled program for each number of rows.

        With `lead`, a shape, the rows have these leading axes, and weights and masks have no last axis.
        """
        weights = self.spread(np.ones(self.size) if weights is None else weights, np.float32)
        where = self.spread(np.ones(self.size) if where is None else where, bool)
        logits = self.logits if logits is None else logits
        given = self.labels, logits, self.features, weights, where
        if lead is not None:
            *rows, weights, where = jax.tree.map(functools.partial(_give_lead, size=self.size, lead=lead), given)
            given = *rows, weights[..., 0], where[..., 0]
        # Device arrays are not checked on the host, so the compiled step shows what the host would refuse.
        return program(self.head)(*jax.device_put((*given, self.params, np.float32(scale))), self.key)


def _give_lead(x: Any, size: int, lead: tuple[int, ...]) -> Any:
    """Gives a value for each row other leading axes; a column of another length stays unchanged."""
    return np.reshape(x, (*lead, *np.shape(x)[1:])) if np.shape(x)[:1] == (size,) else x


def _is_of_sequences(head: AbstractHead) -> bool:
    """Tells whether a head, or a head inside, has steps between rows and logits."""
    inside = head.parts()
    return head.coupling == "sequence" or "" in inside or any(map(_is_of_sequences, inside.values()))


@functools.lru_cache(maxsize=64)
def predictor(head: Head) -> Any:
    """Returns the compiled function from logits to predictions: all of them, and each by its key alone."""

    def predict(logits: Any, features: Any, params: Any, key: Any) -> tuple[Any, dict[str, Any]]:
        rest = {"features": features, "params": params, "key": key}
        every = head.predictions(logits, **rest)
        keys = () if head.parts() else tuple(every)
        return every, {name: head.predictions(logits, name, **rest)[name] for name in keys}

    return jax.jit(predict)


@functools.lru_cache(maxsize=64)
def program(head: Head) -> Any:
    """Returns the compiled function from rows to `Values`, with the loss multiplied by a scale."""
    others = {}
    if not head.parts() and "loss_reduction" in {field.name for field in dataclasses.fields(head)}:
        others = {reduction.value: dataclasses.replace(head, loss_reduction=reduction) for reduction in Reduction}

    def run(
        labels: Any, logits: Any, features: Any, weights: Any, where: Any, params: Any, scale: Any, key: Any
    ) -> Values:
        rest = {"features": features, "weights": weights, "where": where, "key": key}

        def loss(logits: Any, params: Any) -> jax.Array:
            return scale * head.loss(labels, logits, **rest, params=params)

        value, (by_logits, by_params) = jax.value_and_grad(loss, argnums=(0, 1), allow_int=True)(logits, params)
        losses = {name: other.loss(labels, logits, **rest, params=params) for name, other in others.items()}
        metrics = head.measure(labels, logits, **rest, params=params)
        return Values(value, by_logits, _floats(by_params), losses, metrics)

    return jax.jit(run)


def _floats(tree: Any) -> Any:
    """Keeps gradients of floating-point values; integers of the running fields have no gradient."""
    return jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.floating) else None, tree)

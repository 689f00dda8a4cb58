"""A flax model in the three parts that a training step takes."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, nnx

from jaxheads.numerics import brief, fields

# The names by which a model's `__call__` asks whether it is trained.
IF_TRAINED, UNLESS_TRAINED = ("train", "training", "is_training"), ("deterministic",)


class Split(NamedTuple):
    """The parts of a model.

    Attributes:
        params: the parameters, for `TrainState.create(params=...)`; nested dicts.
        model_state: what the network updates without gradients, such as batch statistics, for
            `TrainState.create(model_state=...)`; None if there is nothing.
        apply_fn: the model as a function, for `make_train_step`, `make_eval_step` and `make_predict_step`.
    """

    params: Any
    model_state: Any
    apply_fn: Callable[..., Any]


def split(
    model: Any, *, inputs: str | Callable[[Any], Any] | None = None, key: Any = None, features: Any = None
) -> Split:
    """Splits an nnx or a linen model into parameters, state and a function, as training steps take them.

    The function calls the model with one argument, the features of a batch or what `inputs` takes from them. It says
    whether the model is trained: to an nnx model by `model.train()` and `model.eval()`, and to both kinds by the
    argument `train`, `training`, `is_training` or `deterministic`, if `__call__` declares one.

    Random streams of an nnx model, as dropout has them, get new keys from the step: other ones in each step, and on
    each device. They are not in `model_state`. A linen model gets the keys as `rngs`. What a model stores by `sow` is
    left out.

    Args:
        model: an instance of `flax.nnx.Module` or `flax.linen.Module`. An nnx model stays as it is: train the parts.
        inputs: the key of the features that the model takes, or a function of the features. By default the model takes
            the features as they are.
        key: a random key, for the first parameters of a linen model. An nnx model has its parameters already.
        features: the features of any batch, for a linen model: their shapes decide those of the parameters.

    Returns:
        `(params, model_state, apply_fn)`.

    Raises:
        ValueError: a model that is none; a linen model without `key` and `features`, or an nnx model with them;
            `inputs` that are neither a key of the features nor a function; in a step with `rngs=()`, an nnx model with
            random streams.

    >>> import jax, optax
    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> import jaxheads as jh
    >>> head, optimizer = jh.BinaryClassHead(), optax.sgd(0.5)
    >>> params, model_state, apply_fn = jh.nn.split(nnx.Linear(2, 1, rngs=nnx.Rngs(0)), inputs="x")
    >>> step = jax.jit(jh.make_train_step(head, apply_fn, optimizer))
    >>> state = jh.TrainState.create(
    ...     params=params, model_state=model_state, optimizer=optimizer, head=head, key=jax.random.key(0))
    >>> batch = {"features": {"x": jnp.array([[1.0, 0.0], [0.0, 2.0]])}, "labels": jnp.array([1, 0])}
    >>> for _ in range(20):
    ...     state, out = step(state, batch)
    >>> float(out.loss) < 0.1
    True
    """
    if inputs is not None and not isinstance(inputs, str) and not callable(inputs):
        raise ValueError(
            f"inputs must be a key of the features, or a function of the features. Given {brief.tell(inputs)}."
        )
    read = functools.partial(_read, inputs)
    if isinstance(model, nnx.Module):
        if key is not None or features is not None:
            raise ValueError(
                f"An nnx model has its parameters already. Given key or features with a {type(model).__name__}. Leave "
                "them out."
            )
        return _split_nnx(model, read)
    if not isinstance(model, linen.Module):
        given = f"the class {model.__name__}" if isinstance(model, type) else brief.tell(model)
        raise ValueError(
            f"model must be an instance of flax.nnx.Module or flax.linen.Module. Given {given}. For other networks, "
            "write apply_fn(params, features) yourself."
        )
    if key is None or features is None:
        raise ValueError(
            f"A linen model has no parameters yet. Given a {type(model).__name__} without key and features. Write "
            'jh.nn.split(model, key=jax.random.key(0), features=batch["features"]).'
        )
    fields.check_key(key)
    return _split_linen(model, read, key, features)


def _read(inputs: str | Callable[[Any], Any] | None, features: Any) -> Any:
    """Returns what the model takes of the features."""
    if inputs is None:
        return features
    if not isinstance(inputs, str):
        return inputs(features)
    if not isinstance(features, Mapping) or inputs not in features:
        given = brief.tell_names(features) if isinstance(features, Mapping) else f"a {type(features).__name__}"
        raise ValueError(f"inputs={inputs!r} must be a key of the features. Given features {given}.")
    return features[inputs]


def _find_switch(model: Any) -> Callable[[bool], dict[str, bool]]:
    """Returns a function that makes the argument by which the model is told whether it is trained."""
    declared = inspect.signature(type(model).__call__).parameters
    positive = [name for name in IF_TRAINED if name in declared][:1]
    negative = [name for name in UNLESS_TRAINED if name in declared]
    return lambda train: dict.fromkeys(positive, train) | dict.fromkeys(negative, not train)


def _split_linen(model: Any, read: Callable[[Any], Any], key: Any, features: Any) -> Split:
    switch = _find_switch(model)
    first = jax.jit(lambda key, features: model.init(key, read(features), **switch(False)))(key, features)
    rest = {name: value for name, value in first.items() if name != "params"}

    def apply_fn(params: Any, features: Any, *, train: bool, model_state: Any, rngs: Any) -> Any:
        variables = {"params": params, **(model_state or {})}
        if not train:
            return model.apply(variables, read(features), **switch(False))
        out = model.apply(variables, read(features), **switch(True), rngs=rngs, mutable=[*(model_state or {})])
        return out if model_state else out[0]

    return Split(first.get("params", {}), rest or None, apply_fn)


def _split_nnx(model: nnx.Module, read: Callable[[Any], Any]) -> Split:
    switch = _find_switch(model)
    graphdef, params, streams, rest = nnx.split(model, nnx.Param, nnx.RngState, ...)
    # Plain dicts outside, which optimizers, checkpoints and users know.
    outside = [nnx.to_pure_dict(state) for state in (params, rest)]
    inside = [jax.tree.structure(state) for state in (params, rest)]

    def apply_fn(params: Any, features: Any, *, train: bool, model_state: Any, rngs: Any) -> Any:
        keyed = _renew(streams, rngs, model) if train else streams
        given = zip(inside, outside, (params, {} if model_state is None else model_state), strict=True)
        states = [structure.unflatten(jax.tree.leaves(_fit(like, tree))) for structure, like, tree in given]
        merged: Any = nnx.merge(graphdef, states[0], keyed, states[1], copy=True)
        (merged.train if train else merged.eval)()
        logits = merged(read(features), **switch(train))
        if not train or model_state is None:
            return logits
        nnx.pop(merged, nnx.Intermediate)
        new: Any = nnx.split(merged, nnx.Param, nnx.RngState, ...)[3]
        return logits, nnx.to_pure_dict(new)

    return Split(outside[0], outside[1] or None, apply_fn)


def _fit(like: Any, tree: Any, path: str = "") -> Any:
    """Returns a tree of dicts with the keys, and so in the order, of another.

    Checkpoints give the numbers of a list back as texts, and texts have another order: "10" comes before "2".
    """
    if not isinstance(like, Mapping):
        return tree
    given = {str(key): value for key, value in tree.items()} if isinstance(tree, Mapping) else {}
    if given.keys() != {str(key) for key in like}:
        kind = brief.tell_names(given) if isinstance(tree, Mapping) else brief.tell(tree)
        raise ValueError(
            "params and model_state must have the names that jh.nn.split gave them. Given "
            f"{kind} at {path or 'the top'}, expected {brief.tell_names(like)}."
        )
    return {key: _fit(inner, given[str(key)], f"{path}/{key}") for key, inner in like.items()}


def _renew(streams: Any, rngs: Mapping[str, Any] | None, model: Any) -> Any:
    """Returns the random streams of a model, with keys that are made of the first key of the step."""
    leaves, structure = jax.tree.flatten(streams)
    if leaves and not rngs:
        raise ValueError(
            f"This {type(model).__name__} has random streams, as dropout needs them, and the step gives no keys. Leave "
            'out make_train_step(rngs=()), or write rngs=("dropout",).'
        )

    def renew(i: int, leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf
        key = jax.random.fold_in(next(iter((rngs or {}).values())), i)
        return jax.random.split(key, leaf.shape) if leaf.shape else key

    return structure.unflatten([renew(i, leaf) for i, leaf in enumerate(leaves)])

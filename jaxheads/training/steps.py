"""Training, evaluation and prediction as pure functions of a `TrainState` and a batch; you jit, shard or pmap them.

Each function fits on a page. If your step must do more, copy the function and change it.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxheads.contract import Given
from jaxheads.engine import evaluating, losing, trees
from jaxheads.engine.gathering import gather
from jaxheads.engine.measuring import clear
from jaxheads.engine.optimizing import (
    averaged,
    check_opt_state,
    check_optimizer,
    find_learning_rate,
    global_norm,
    is_finite,
    updated,
)
from jaxheads.engine.readiness import check_parts_add_up, ready
from jaxheads.head import Head, check_unbound
from jaxheads.numerics import brief, fields, inputs, meshes, pairs
from jaxheads.training.checking import KEYS, attach_head
from jaxheads.training.scaling import LossScale, check_scale, multiply
from jaxheads.training.state import TrainState, split_params

PASSED = ("train", "model_state", "rngs")
REPLICAS = 2**31 - 1  # folded into the keys of bootstrap replicas; no micro-batch has this number


class StepOutput(NamedTuple):
    """The output of a step.

    Attributes:
        loss: the regularized loss of this batch, float32; over all devices of `axis_name`.
        metrics: the `Metrics` of this batch, which can be added; None with `with_metrics=False`.
        grad_norm: with `with_norms=True`, the global norm of the gradients as the optimizer gets them, float32:
            `sqrt(sum(g**2))` over all entries of all arrays, those of the head included. None otherwise.
        param_norm: likewise, the norm of the parameters after the step, `state.trainable`.
        update_norm: likewise, the norm of what the optimizer added to them.
        learning_rate: likewise, the learning rate of this step, if the optimizer's state holds one. See
            `make_train_step`.
        skipped: with `skip_nonfinite=True` or a dynamic `loss_scale`, whether this step was skipped, bool. None
            otherwise.
    """

    loss: jax.Array
    metrics: Any
    grad_norm: Any = None
    param_norm: Any = None
    update_norm: Any = None
    learning_rate: Any = None
    skipped: Any = None


def make_train_step(
    head: Head,
    apply_fn: Callable[..., Any],
    optimizer: Any,
    *,
    axis_name: Any = None,
    regularization_fn: Callable[[Any], Any] | None = None,
    rngs: Sequence[str] = ("dropout",),
    micro_batches: int = 1,
    with_metrics: bool = True,
    with_norms: bool = False,
    skip_nonfinite: bool = False,
    loss_scale: float | None = None,
) -> Callable[[TrainState, Mapping[str, Any]], tuple[TrainState, StepOutput]]:
    """Makes a step of training, `(state, batch) -> (state, out)`. Jit it, with `donate_argnums=0` to update in place.

    A donated state is gone. To keep a state, for example the best so far, copy it: `jax.tree.map(jnp.copy, state)`.

    A batch is a dict of `features`, `labels`, and perhaps `weights` and `where`, as `head.loss` takes them. String
    labels must be encoded.

    Args:
        head: the head, unbound. Its learned fields are trained with the network. Each batch updates its running fields.
        apply_fn: `apply_fn(params, features, *, train, model_state, rngs)` returns logits, as the head takes them, or
            the pair `(logits, model_state)`. It gets only the keywords that it declares. A function with `**kwargs`
            gets all three; flax's own `apply` is such a function, so wrap it.
        optimizer: the optax `GradientTransformation` of the state. It gets `value`, `grad` and `value_fn` if it takes
            them: the loss, its gradient, and the loss of the same batch as a function of the parameters. So line
            searches, such as `optax.lbfgs()`, work as they are; give them all parameters, and large batches.
        axis_name: the mapped axis of `shard_map` or `pmap` over which batches are spread. Loss and metrics describe the
            global batch, gradients and floating-point `model_state` are averaged, dropout differs by device. The state
            must be the same on all devices, `in_specs=P()`. Parameters may be spread over the axis and gathered in
            `apply_fn`: this is right under the default check of `shard_map`, where each device keeps its own gradient,
            and wrong without the check. If the check refuses the carry of a loop in `apply_fn`, use `check_vma=False`.
        regularization_fn: `params -> scalar or list of scalars`, added to the loss.
        rngs: names of the random keys for `apply_fn`; each step makes new keys.
        micro_batches: the number of parts, equal in size, in which the batch passes the network, one after another.
            Gradients equal the gradients of the whole batch for any masks and weights, if its elements do not depend on
            each other and the head counts them by their labels. Each part updates `model_state`, and batch norm
            normalizes within a part. Under `jit` over a mesh, and under the default check of `shard_map`, gradients
            cross devices once for each part.
        with_metrics: whether `out.metrics` is made.
        with_norms: whether `out.grad_norm`, `out.param_norm`, `out.update_norm` and `out.learning_rate` are made. They
            describe all devices of `axis_name` and all micro-batches together. The learning rate is read from the state
            of `optax.inject_hyperparams`, for example `optax.inject_hyperparams(optax.adam)(schedule)`. It is None for
            other optimizers, as no state holds the value of the schedule in `optax.adam(schedule)`, and None for an
            optimizer with several.
        skip_nonfinite: whether a step is skipped if its loss, its gradients, the new parameters or the new
            `model_state` are not finite, on any device or in any micro-batch: parameters, optimizer, `model_state` and
            the running fields of the head stay as they were. `state.step` counts a skipped step too, as it does with
            `optax.apply_if_finite`, so that the next step draws other keys. `out.skipped` tells, `out.loss` and
            `out.grad_norm` are as they were found, `out.update_norm` is 0. `out.metrics` are empty but for the number
            of illegal elements, so that their sum stays finite. `TrainState.create(count_skipped=True)` counts the
            skipped steps. There is no limit to their number: look at it.
        loss_scale: a number by which the loss is multiplied before its gradient is taken. The gradient is divided by it
            at once, so only intermediate values of the network feel it: in float16, gradients below 6e-8 are 0. Keep
            parameters in float32 and cast them in `apply_fn`. Combine it with `skip_nonfinite`, as a large scale
            overflows. A scale that adapts is a part of the state: `TrainState.create(loss_scale=...)`.

    Raises:
        ValueError: an optimizer that is none; a switch that is not True or False; a `loss_scale` that is not a positive
            number; an `apply_fn` that cannot carry the state of the model; in the step, a batch with other keys or,
            with `micro_batches`, of another size; a state whose `loss_scale` or count of skipped steps does not fit to
            the step; also the errors of `head.loss`.

    >>> import jax, optax
    >>> import jax.numpy as jnp
    >>> import jaxheads as jh
    >>> head, optimizer = jh.BinaryClassHead(), optax.sgd(0.5)
    >>> step = jax.jit(jh.make_train_step(head, lambda params, features: features["x"] @ params["w"], optimizer))
    >>> key = jax.random.key(0)
    >>> state = jh.TrainState.create(params={"w": jnp.zeros((2, 1))}, optimizer=optimizer, head=head, key=key)
    >>> batch = {"features": {"x": jnp.array([[1.0, 0.0], [0.0, 2.0]])}, "labels": jnp.array([1, 0])}
    >>> state, out = step(state, batch)
    >>> state.params["w"].ravel(), out.loss  # 0.5 times (0.5 * 1, -0.5 * 2) / 2
    (Array([ 0.125, -0.25 ], dtype=float32), Array(0.6931472, dtype=float32))
    """
    check_unbound(head)
    check_optimizer(optimizer)
    call, labelled = _wrap(apply_fn), _is_labelled(head)
    if isinstance(micro_batches, bool) or not isinstance(micro_batches, int) or micro_batches < 1:
        raise ValueError(f"micro_batches must be an integer of at least 1. Given {micro_batches!r}.")
    if (names := brief.as_names(rngs)) is None:
        raise ValueError(f"rngs must be names of random keys, () for none. Given {brief.tell(rngs)}.")
    for name, switch in (
        ("with_metrics", with_metrics),
        ("with_norms", with_norms),
        ("skip_nonfinite", skip_nonfinite),
    ):
        inputs.check_switch(name, switch)
    if loss_scale is not None:
        loss_scale = _read_fixed(loss_scale)
    draws_keys = _draws_keys(head)
    if micro_batches > 1:
        check_parts_add_up(head)

    def scaled(loss: jax.Array, state: TrainState) -> jax.Array:
        if state.loss_scale is not None:
            return state.loss_scale.scale(loss)
        return loss if loss_scale is None else multiply(loss, loss_scale)

    def unscaled(grads: Any, state: TrainState) -> Any:
        if state.loss_scale is not None:
            # The scales of jmp may change the dtype.
            return jax.tree.map(lambda new, old: new.astype(old.dtype), state.loss_scale.unscale(grads), grads)
        return grads if loss_scale is None else multiply(grads, 1 / loss_scale)

    def rngs_of(key: jax.Array) -> dict[str, jax.Array]:
        return {name: jax.random.fold_in(key, i) for i, name in enumerate(names)}

    def part(state: TrainState, batch: dict[str, Any], key: jax.Array, carried: Any, divisor: Any, with_metrics: bool):
        """Returns loss, gradients and metrics of a batch or a part, and the next states of the model and the head."""
        model_state, head_state = carried
        keys, draws = rngs_of(key), jax.random.fold_in(key, REPLICAS) if draws_keys else None

        def loss_of(trainable: Any):
            params, head_params = split_params(trainable, bool(state.head_params))
            logits, new = call(params, batch["features"], True, model_state, keys)
            bound = ready(head, fields.merge(head_params, state.head_state))
            found = gather(bound, _to_given(batch, logits, with_metrics, draws, divisor))
            losses = _list_losses(regularization_fn, params)
            shares = None if losses is None else inputs.as_scalars([loss / micro_batches for loss in losses])
            loss, found = evaluating.evaluate(bound, found, shares, axis_name)
            return scaled(loss, state), (loss, found._replace(regularization=inputs.as_scalars(losses)), new)

        (_, (loss, found, model_state)), grads = jax.value_and_grad(loss_of, has_aux=True)(state.trainable)
        grads = unscaled(grads, state)
        metrics = None
        if with_metrics:
            metrics = evaluating.metrics_of(ready(head, state.bound), found, axis_name)
        if head_state:
            bound = ready(head, fields.merge(state.head_params, head_state))
            head_state = evaluating.advance(bound, found.batch, axis_name, found.seen)
        return loss, grads, metrics, (averaged(model_state, axis_name), head_state)

    def train_step(state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, StepOutput]:
        _check_state(state)
        _check_guards(state, skip_nonfinite, loss_scale)
        check_opt_state(optimizer, state.opt_state, state.trainable)
        given, key = _unpack(batch, labelled), jax.random.fold_in(state.key, state.step)
        if axis_name is not None:
            meshes.check_axis(axis_name)
            _check_shared(state, axis_name)
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))

        def evaluate(state: TrainState, with_metrics: bool) -> tuple[jax.Array, Any, Any, Any]:
            carried = state.model_state, state.head_state
            if micro_batches == 1:
                loss, grads, metrics, carried = part(state, given, key, carried, None, with_metrics)
            else:
                loss, grads, metrics, carried = in_parts(state, given, key, carried, with_metrics)
            return loss, meshes.mean_of_gradients(grads, axis_name), metrics, carried

        def look(trainable: Any) -> tuple[jax.Array, Any]:
            params, head_params = split_params(trainable, bool(state.head_params))
            return evaluate(dataclasses.replace(state, params=params, head_params=head_params), False)[:2]

        loss, grads, metrics, carried = evaluate(state, with_metrics)
        if axis_name is not None:
            metrics = None if metrics is None else metrics.psum(axis_name)
        trainable, opt_state, updates = updated(
            optimizer, grads, state.opt_state, state.trainable, loss, look, axis_name
        )
        params, head_params = split_params(trainable, bool(state.head_params))
        model_state, head_state = carried
        new = dataclasses.replace(
            state,
            step=state.step + 1,
            params=params,
            head_params=head_params,
            opt_state=opt_state,
            model_state=model_state,
            head_state=head_state,
        )
        out = StepOutput(loss, metrics)
        if skip_nonfinite or state.loss_scale is not None:
            finite = is_finite((loss, grads, new.trainable, new.model_state), axis_name)
            new = _keep_finite(finite, new, state)
            updates = jax.tree.map(lambda x: jnp.where(finite, x, jnp.zeros_like(x)), updates)
            metrics = None if metrics is None else clear(metrics, ~finite)
            out = StepOutput(loss, metrics, skipped=~finite)
        if with_norms:
            names = "grad_norm", "param_norm", "update_norm"
            norms = [global_norm(tree, axis_name) for tree in (grads, new.trainable, updates)]
            rate = find_learning_rate(opt_state)
            out = out._replace(**dict(zip(names, norms, strict=True)), learning_rate=rate)
        return new, out

    def in_parts(state: TrainState, batch: dict[str, Any], key: jax.Array, carried: Any, with_metrics: bool):
        """Returns the sums of `part` over the micro-batches. All have the divisor of the whole batch's loss."""
        bound = ready(head, state.bound)
        logits = _make_zero_logits(functools.partial(call, rngs=rngs_of(key)), state, batch["features"])
        draws = key if draws_keys else None
        divisor = losing.divisor(bound, gather(bound, _to_given(batch, logits, False, draws, None)), axis_name)
        parts = jax.tree.map(lambda x: _split(x, micro_batches), batch)

        def body(carry: Any, xs: Any):
            total, carried = carry
            i, micro = xs
            key_of_part = jax.random.fold_in(key, i)
            loss, grads, metrics, carried = part(state, micro, key_of_part, carried, divisor, with_metrics)
            total = jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, grads)
            return (total, carried), (loss, metrics)

        # In float32 at least: a bfloat16 sum of many small gradients would lose most of them.
        zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.promote_types(x.dtype, jnp.float32)), state.trainable)
        (grads, carried), (losses, metrics) = jax.lax.scan(body, (zeros, carried), (jnp.arange(micro_batches), parts))
        grads = jax.tree.map(lambda g, x: g.astype(x.dtype), grads, state.trainable)
        if metrics is not None:
            exact = pairs.add(metrics.state, jnp.zeros_like(metrics.state))
            metrics = dataclasses.replace(metrics, state=pairs.fold(exact, pairs.add))
        return jnp.sum(losses), grads, metrics, carried

    return attach_head(train_step, head, optimizer)


def make_eval_step(
    head: Head,
    apply_fn: Callable[..., Any],
    *,
    axis_name: Any = None,
    regularization_fn: Callable[[Any], Any] | None = None,
) -> Callable[..., StepOutput]:
    """Makes a step of evaluation, `(state, batch) -> out`; add up `out.metrics`. It takes the arguments of training.

    For a head with a `bootstrap` it is `(state, batch, key) -> out`, with a new key for every batch. Under `axis_name`,
    each device folds its own key from it.
    """
    check_unbound(head)
    call, labelled = _wrap(apply_fn), _is_labelled(head)

    def eval_step(state: TrainState, batch: Mapping[str, Any], key: jax.Array | None = None) -> StepOutput:
        _check_state(state)
        given, bound = _unpack(batch, labelled), ready(head, state.bound)
        logits, _ = call(state.params, given["features"], False, state.model_state, None)
        if key is not None and axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        found = gather(bound, _to_given(given, logits, True, key, None))
        losses = inputs.as_scalars(_list_losses(regularization_fn, state.params))
        loss, found = evaluating.evaluate(bound, found, losses, axis_name)
        metrics = evaluating.metrics_of(bound, evaluating.without_gradient(found), axis_name)
        return StepOutput(loss, metrics if axis_name is None else metrics.psum(axis_name))

    return attach_head(eval_step, head)


def make_predict_step(
    head: Head, apply_fn: Callable[..., Any], keys: Any = None
) -> Callable[[TrainState, Mapping[str, Any]], dict[str, Any]]:
    """Makes a step of prediction, `(state, batch) -> predictions`. It reads only the `features` of the batch.

    `keys` are the keys of `head.predictions`; by default all.
    """
    check_unbound(head)
    call = _wrap(apply_fn)

    def predict_step(state: TrainState, batch: Mapping[str, Any]) -> dict[str, Any]:
        _check_state(state)
        features = _unpack(batch, None)["features"]
        logits, _ = call(state.params, features, False, state.model_state, None)
        return head.predictions(logits, keys, params=state.bound, features=features)

    return predict_step


def _check_state(state: Any) -> None:
    if not isinstance(state, TrainState):
        raise ValueError(
            "A step takes a TrainState, from jh.TrainState.create(params=..., optimizer=..., head=..., key=...). "
            f"Given a {type(state).__name__}."
        )


def _read_fixed(loss_scale: Any) -> float:
    """Returns a fixed scale of the loss, and refuses what is not a number."""
    if isinstance(loss_scale, LossScale):
        raise ValueError(
            f"make_train_step(loss_scale=...) takes a fixed number. Given a {type(loss_scale).__name__}. A scale that "
            "adapts is a part of the state: TrainState.create(loss_scale=...)."
        )
    return check_scale("loss_scale", loss_scale)


def _check_guards(state: TrainState, skip_nonfinite: bool, loss_scale: float | None) -> None:
    """Refuses a state that counts what the step never does, and a state with a second scale of the loss."""
    if state.loss_scale is not None and loss_scale is not None:
        raise ValueError(
            f"The loss has two scales: loss_scale={loss_scale} of the step, and the "
            f"{type(state.loss_scale).__name__} of the TrainState. Leave one out."
        )
    if state.skipped is not None and state.loss_scale is None and not skip_nonfinite:
        raise ValueError(
            "The TrainState counts skipped steps, and this step skips none. Pass make_train_step(..., "
            "skip_nonfinite=True), or create the state without count_skipped."
        )


def _keep_finite(finite: jax.Array, new: TrainState, old: TrainState) -> TrainState:
    """Returns the new state; where `finite` is False, the old one after a step that was skipped."""
    names = "params", "head_params", "opt_state", "model_state", "head_state"

    def choose(a: Any, b: Any) -> Any:
        return jnp.where(finite, a, jnp.asarray(b, a.dtype))

    chosen = {name: jax.tree.map(choose, getattr(new, name), getattr(old, name)) for name in names}
    if old.loss_scale is not None:
        chosen["loss_scale"] = old.loss_scale.adjust(finite)
    if old.skipped is not None:
        chosen["skipped"] = old.skipped + (~finite).astype(old.skipped.dtype)
    return dataclasses.replace(new, **chosen)


def _check_shared(state: TrainState, axis_name: Any) -> None:
    """Refuses a state stacked by device: each device would train its own."""
    if meshes.varies(state.step, axis_name):
        raise ValueError(
            f"The TrainState differs over axis_name={axis_name!r}: it came in by in_specs=P({axis_name!r}), stacked by "
            "device, and each device would train its own. Pass one state with in_specs=P() and out_specs=P(); stacked "
            "states are for jax.pmap, or check_vma=False."
        )


def _wrap(apply_fn: Any) -> Callable[..., tuple[Any, Any]]:
    """Wraps `apply_fn`: it gets the keywords that it declares, and always returns the pair `(logits, model_state)`."""
    if not callable(apply_fn):
        raise ValueError(f"apply_fn must be a function apply_fn(params, features, ...). Given {apply_fn!r}.")
    try:
        declared = inspect.signature(apply_fn).parameters
    except ValueError as error:
        raise ValueError(
            f"apply_fn must be a function apply_fn(params, features, ...) of Python. Given {brief.tell(apply_fn)}."
        ) from error
    takes_all = any(p.kind is p.VAR_KEYWORD for p in declared.values())
    passed = [name for name in PASSED if takes_all or name in declared]

    def call(params: Any, features: Any, train: bool, model_state: Any, rngs: Any) -> tuple[Any, Any]:
        given = {"train": train, "model_state": model_state, "rngs": rngs}
        if model_state is not None and "model_state" not in passed:
            raise ValueError(
                "The TrainState carries a model_state, and apply_fn has no argument of that name. Given arguments: "
                f"{[*declared]}. Declare it, apply_fn(params, features, *, train, model_state, rngs)."
            )
        out = apply_fn(params, features, **{name: given[name] for name in passed})
        if not isinstance(out, tuple):
            if train and model_state is not None:
                raise ValueError(
                    "apply_fn must return (logits, model_state) in training, for the TrainState carries a model_state. "
                    f"Given {type(out).__name__} alone: what the network updates would be lost."
                )
            return out, model_state
        if len(out) != 2:
            raise ValueError(f"apply_fn must return logits or (logits, model_state). Given {len(out)} values.")
        logits, new = out
        if train and (before := _describe(model_state)) != (after := _describe(new)):
            raise ValueError(
                "apply_fn must return a model_state of the same structure, shapes and dtypes as the state holds. Given "
                f"{after}, expected {before}. Pass its first value to TrainState.create(model_state=...)."
            )
        return logits, new

    return call


def _describe(tree: Any) -> dict[str, str]:
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{jnp.result_type(x)}{list(jnp.shape(x))}" for path, x in leaves}


def _is_labelled(head: Head) -> bool:
    """Tells whether any head inside has labels."""
    return any(leaf.label_spec for leaf in trees.leaves(head))


def _draws_keys(head: Head) -> bool:
    """Tells whether any head inside needs a random key."""
    return any(leaf.samples or leaf.bootstrap is not None for leaf in trees.leaves(head))


def _unpack(batch: Any, labelled: bool | None) -> dict[str, Any]:
    """Returns the checked entries of a batch; only the features for prediction, where `labelled` is None."""
    needed = KEYS[: 2 if labelled else 1]
    given = sorted(map(str, batch)) if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
    if not isinstance(batch, Mapping) or set(batch) - set(KEYS) or set(needed) - set(batch):
        raise ValueError(
            f"A batch must be a dict with the keys {list(needed)}, and none but {list(KEYS)}. Given {given}. Other "
            "columns belong into features."
        )
    return {"features": batch["features"]} if labelled is None else dict(batch)


def _to_given(batch: Mapping[str, Any], logits: Any, with_slices: bool, key: Any, normalizer: Any) -> Given:
    """Returns a batch and its logits in the form of a call of `head.loss` or `head.measure`."""
    entries = {"labels": None, **batch}
    return Given(**entries, logits=logits, normalizer=normalizer, with_slices=with_slices, key=key)


def _list_losses(regularization_fn: Callable[[Any], Any] | None, params: Any) -> list[Any] | None:
    if regularization_fn is None:
        return None
    losses = regularization_fn(params)
    return list(losses) if isinstance(losses, (list, tuple)) else [losses]


def _make_zero_logits(call: Callable[..., tuple[Any, Any]], state: TrainState, features: Any) -> Any:
    """Returns zeros in the shape of the logits of a whole batch, without running the network."""

    def logits(params: Any, features: Any, model_state: Any) -> Any:
        return call(params, features, train=True, model_state=model_state)[0]

    shapes = jax.eval_shape(logits, state.params, features, state.model_state)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _split(x: Any, n: int) -> jax.Array:
    x = jnp.asarray(x)
    if not x.ndim or x.shape[0] % n:
        raise ValueError(
            f"micro_batches={n} must divide the first axis of all that is in a batch. Given shape {x.shape}. Fill the "
            "batch up with jh.pad_batch(batch, size)."
        )
    # A part has every n-th row, so that rows spread over devices stay where they are.
    return jnp.swapaxes(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 0, 1)

"""Loops for notebooks and scripts: `evaluate` and `fit`. If you need more, write your own loop around the steps."""

import contextlib
import pathlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.metrics import Metrics
from jaxheads.metrics.base import LOSS, join_names
from jaxheads.numerics import brief, describing, inputs
from jaxheads.numerics.fields import check_key
from jaxheads.numerics.warned import CheckpointWarning
from jaxheads.training.callbacks import Callback, Log, call, find_log, list_callbacks
from jaxheads.training.checking import (
    check_batch,
    check_batches,
    check_function_of_epochs,
    head_of,
    looked_at,
    optimizer_of,
)
from jaxheads.training.checkpoints import Checkpoints, Damaged, as_folder, locked
from jaxheads.training.processes import aborting, let_through
from jaxheads.training.progress import (
    TRAIN,
    VALIDATION,
    Progress,
    bar_of,
    check_first_batch,
    check_monitor,
    describe_first_batch,
    mean_loss_and_metrics,
)
from jaxheads.training.state import TrainState
from jaxheads.training.text import describe

Batches = Iterable[Mapping[str, Any]]

# How many numbers of its history a result shows.
MOST_SHOWN = 24


class Fitted(NamedTuple):
    """The result of `fit`.

    Attributes:
        state: the state after the last step.
        best: the state after the best epoch by the monitored metric; without validation, after the last epoch.
        history: a dict for each epoch: `epoch`, `step`, `train/loss` (the mean over steps), `validation/loss`, and the
            metrics, as `train/auc` and `validation/auc`. A step `with_norms` adds the means over steps of
            `train/grad_norm`, `train/param_norm`, `train/update_norm` and `train/learning_rate`. A step that may be
            skipped adds `train/skipped`, the number of skipped steps; means are over the others, NaN if there are none.
    """

    state: TrainState
    best: TrainState
    history: list[dict[str, float]]

    def __repr__(self) -> str:
        """The last epoch in a few lines; the states are in `state` and `best`."""
        last = self.history[-1] if self.history else {}
        numbers = {key: value for key, value in last.items() if key not in ("epoch", "step")}
        shown = dict(list(numbers.items())[:MOST_SHOWN])
        width = max(map(len, shown), default=0)
        lines = [f"  {key:<{width}}  {value:.5g}" for key, value in shown.items()]
        lines += [f"  and {len(numbers) - len(shown)} more in history[-1]"] if len(shown) < len(numbers) else []
        epochs = f"{len(self.history)} epoch{'' if len(self.history) == 1 else 's'}"
        steps = f"step {describe(self.state.step)}, best at step {describe(self.best.step)}"
        return "\n".join([f"Fitted: {epochs}, {steps}", *lines])


def evaluate(
    state: TrainState, eval_step: Callable[..., Any], batches: Batches, *, key: Any = None, progress: bool = False
) -> Metrics:
    """Returns the `Metrics` of all batches.

    Args:
        state: a `TrainState`.
        eval_step: the step that `make_eval_step` returned; it is compiled here if it is not compiled yet.
        batches: the batches.
        key: a random key, for a head with a `bootstrap`.
        progress: whether to show a bar (if tqdm is installed).

    Raises:
        ValueError: one batch in place of a list of them; no batches; in the first batch, values that are no arrays of
            numbers, or illegal labels in host arrays.
    """
    if not callable(eval_step):
        raise ValueError(f"eval_step must be a step, as jh.make_eval_step makes it. Given {brief.tell(eval_step)}.")
    if head_of(eval_step) is not None:
        _check_state(state, eval_step)
    inputs.check_switch("progress", progress)
    if key is not None:
        check_key(key)
    bar = bar_of(check_batches(batches, "batches"), "evaluate", progress)
    bar = looked_at(bar, eval_step, "The first batch")
    return mean_loss_and_metrics(state, _compile(eval_step), bar, key)[1]


def fit(
    state: TrainState,
    train_step: Callable[..., Any],
    batches: Batches | Callable[[int], Batches],
    *,
    epochs: int = 1,
    eval_step: Callable[..., Any] | None = None,
    validation: Batches | None = None,
    monitor: str = "loss",
    higher_is_better: bool | None = None,
    patience: int | None = None,
    directory: Any = None,
    checkpoint_every: int | None = None,
    allow_changes: bool = False,
    writer: Any = None,
    on_epoch_end: Callback | Sequence[Callback] | None = None,
    progress: bool = True,
) -> Fitted:
    """Trains for some epochs, validates after each, keeps the best state, and continues the run of a killed process.

    If several processes train together, an error in one of them ends it at once (`jh.training.abort_on_error`), unless
    it came out of the batches.

    Args:
        state: the first state; it is copied. A `pmap` step must have `in_axes=(None, 0), out_axes=None`.
        train_step: the step that `make_train_step` returned. If it is not compiled yet, it is compiled here, with a
            donated state.
        batches: a list, or another iterable that can be read again; or a function that returns one for an epoch
            (0, 1, ...). Such a function can shuffle, with the epoch as the seed.
        epochs: the number of epochs in all, with those before a resume.
        eval_step: the step that `make_eval_step` returned.
        validation: the batches for `eval_step`.
        monitor: the validation metric that compares epochs; `"loss"` is the mean loss over the batches. Another metric
            needs validation.
        higher_is_better: whether a higher value of the monitor is better; by default, the metric decides. Some metrics
            have no direction, for example a mean of predictions: they need this argument.
        patience: training stops after this many epochs in a row without a better value.
        directory: the folder for checkpoints. If it holds a checkpoint, training continues there, and ends at the same
            numbers if `batches` returns the same for the same epoch. Use a new directory for a new run: the checkpoint
            of another head or optimizer is refused. If the newest checkpoint is damaged, training continues from the
            one before it, with a `CheckpointWarning`. One run at a time holds the directory.
        checkpoint_every: the number of batches between checkpoints; by default there is one after each epoch.
        allow_changes: True goes on with the checkpoint of another head or optimizer, for example to lower the learning
            rate, or with other batches in an epoch that was begun.
        writer: a log that gets the history, with the number of steps. An object with `add_scalar(tag, value, step)`,
            like a `tensorboardX.SummaryWriter`; one with `log_metrics(values, step=step)`, like the module `mlflow`; or
            one with `log(values, step=step)`, like a run of `wandb`.
        on_epoch_end: a function, or a list of them, called as `function(row, state)` after each epoch, when its
            checkpoint is written. `row` is a copy of the epoch's dict in the history, and `state` the `TrainState`. The
            next step overwrites the state, so copy it to keep it. If a function returns True, training stops after this
            epoch; all functions are called first. A stop is in no checkpoint: a resumed run goes on. Several processes
            that train together must stop alike.
        progress: whether to print a line for each epoch, and to show a bar in terminals and notebooks (if tqdm is
            installed).

    Raises:
        ValueError: `eval_step` or `validation` alone; an unknown `monitor`; `patience` or a `monitor` without
            validation, or `checkpoint_every` without a directory; one batch in place of a list of them; epochs without
            batches; in the first batch of an epoch, values that are no arrays of numbers, or illegal labels in host
            arrays; a loss that is not finite; a checkpoint of another run, or of more epochs; a directory that cannot
            be written, or that another process is using; no checkpoint that is intact; a `writer` that is none; a
            function `on_epoch_end` that does not take two arguments, or returns another value than True, False or None.
    """
    for name, given in (("train_step", train_step), ("eval_step", eval_step)):
        if not callable(given) and not (given is None and name == "eval_step"):
            raise ValueError(f"{name} must be a step, as jh.make_{name} makes it. Given {brief.tell(given)}.")
    if (eval_step is None) != (validation is None) or (patience is not None and validation is None):
        raise ValueError("eval_step and validation belong together, and patience needs them: pass both, or none.")
    for name, number in (("epochs", epochs), ("patience", patience), ("checkpoint_every", checkpoint_every)):
        if (number is not None or name == "epochs") and not inputs.is_integer(number, 1):
            raise ValueError(f"{name} must be an integer of at least 1. Given {number!r}.")
    if checkpoint_every is not None and directory is None:
        raise ValueError(f"checkpoint_every needs a directory. Given checkpoint_every={checkpoint_every}.")
    if callable(batches) and not isinstance(batches, type):
        check_function_of_epochs(batches)
    else:
        check_batches(batches, "batches")
    if higher_is_better is not None:
        inputs.check_switch("higher_is_better", higher_is_better)
    if eval_step is not None and validation is not None:
        _check_state(state, eval_step)
        check_batches(validation, "validation")
        monitor, higher_is_better = check_monitor(monitor, higher_is_better, state, eval_step, validation)
    elif monitor != LOSS or higher_is_better is not None:
        raise ValueError(
            "monitor and higher_is_better compare epochs by validation. Given "
            f"monitor={monitor!r}, higher_is_better={higher_is_better!r} without eval_step and validation. Pass both, "
            "or leave these two out."
        )
    write, callbacks = find_log(writer), list_callbacks(on_epoch_end)
    for name, switch in (("allow_changes", allow_changes), ("progress", progress)):
        inputs.check_switch(name, switch)
    _check_state(state, train_step)
    plan = _Plan(
        batches, epochs, eval_step, validation, monitor, bool(higher_is_better), patience, checkpoint_every, []
    )
    folder = as_folder(directory)
    with contextlib.ExitStack() as stack:
        with aborting([]):  # only the first process sees that another run holds the folder
            stack.enter_context(locked(folder))
        return _train(state, train_step, plan, folder, allow_changes, write, callbacks, progress)


@runtime_checkable
class Stepped(Protocol):
    """A state that counts its steps: a `TrainState`, or a state of the user's own, for steps of the user's own."""

    @property
    def step(self) -> Any: ...


def _check_state(state: Any, step: Any) -> None:
    """Refuses a value that is no state; for a step that this library made, a state of another kind too."""
    if not isinstance(state, TrainState if head_of(step) is not None else Stepped):
        raise ValueError(f"state must be a TrainState, as jh.TrainState.create makes it. Given {brief.tell(state)}.")


class _Plan(NamedTuple):
    """The checked arguments of `fit` that say what is trained, and how long."""

    batches: Any
    epochs: int
    eval_step: Any
    validation: Any
    monitor: str
    higher_is_better: bool
    patience: int | None
    checkpoint_every: int | None
    passed: list[Exception]


def _train(
    state: TrainState,
    train_step: Any,
    plan: _Plan,
    folder: pathlib.Path | None,
    allow_changes: bool,
    write: Log,
    callbacks: Sequence[Callback],
    progress: bool,
) -> Fitted:
    step, run = _compile(train_step, donate_argnums=0), {} if folder is None else _describe_run(train_step)
    latest, kept = (Checkpoints(None if folder is None else folder / name) for name in ("latest", "best"))
    state = jax.tree.map(jnp.copy, state)
    state, at = latest.restore(state, run, allow_changes) or (state, Progress())
    if (at.epoch, at.batch) > (plan.epochs, 0):
        begun = f" and {at.batch} batches" if at.batch else ""
        raise ValueError(
            f"directory={str(folder)!r} holds {at.epoch} epochs{begun}. Given epochs={plan.epochs}, the number in all. "
            "Give more, or another directory."
        )
    best = _restore_best(kept, state, at) if plan.validation is not None else state
    begun, at.run = at.run, run
    if progress and (at.epoch or at.batch):
        print(f"going on after epoch {at.epoch}, batch {at.batch} of {folder}")
    with aborting(plan.passed):
        stopped = False
        while not stopped and at.epoch < plan.epochs and (plan.patience is None or at.stale < plan.patience):
            out, skipped = None, at.batch
            given: Any = plan.batches(at.epoch) if callable(plan.batches) else plan.batches
            check_batches(given, "batches")
            bar = bar_of(given, f"epoch {at.epoch + 1}/{plan.epochs}", progress)
            for i, batch in enumerate(let_through(bar, plan.passed)):
                if i == 0:
                    # Only a checkpoint within the epoch, or after one, is compared.
                    needed = skipped or plan.checkpoint_every is not None
                    found = describe_first_batch(batch) if needed else {}
                    if skipped and not allow_changes:
                        check_first_batch(begun, found, at.epoch)
                    at.run = run | found
                if i < skipped:
                    continue
                if i == skipped:
                    check_batch(batch, train_step, f"The first batch of epoch {at.epoch + 1}")
                # Checkpoints are written before a batch, not after it: a resumed epoch then has a batch left.
                if plan.checkpoint_every is not None and i > skipped and i % plan.checkpoint_every == 0:
                    at.check(plan.passed)
                    latest.save(int(state.step), state, at)
                state, out = step(state, batch)
                at.add(out)
            if at.batch == skipped > 0:
                raise ValueError(
                    f"Epoch {at.epoch + 1} was begun with {skipped} batches, and now has no more. Give the same "
                    "batches."
                )
            if at.batch == skipped:
                raise ValueError("fit() was given an epoch without batches. An iterator that was used up? Pass a list.")
            at.check(plan.passed)
            values = _flatten(TRAIN, *at.read(out))
            if plan.validation is not None:
                bar = let_through(bar_of(plan.validation, VALIDATION, progress), plan.passed)
                bar = looked_at(bar, plan.eval_step, "The first batch of validation")
                loss, metrics = mean_loss_and_metrics(state, _compile(plan.eval_step), bar)
                values |= _flatten(VALIDATION, {LOSS: loss}, metrics)
            write(values, int(state.step))
            if progress:
                _print(at.epoch + 1, values, plan.monitor)
            at.end_epoch({"epoch": at.epoch + 1, "step": int(state.step), **values})
            if plan.validation is not None and at.improved(plan.monitor, plan.higher_is_better):
                best = jax.tree.map(jnp.copy, state)
                kept.save(at.epoch, best, at)
            latest.save(int(state.step), state, at)
            stopped = call(callbacks, at.history[-1], state)
    return Fitted(state, state if plan.validation is None else best, at.history)


def _describe_run(train_step: Any) -> dict[str, str]:
    """Returns texts about the head and the optimizer of a step, and about the code of their functions."""
    both = {"head": head_of(train_step), "optimizer": optimizer_of(train_step)}
    texts = {name: describing.describe(found) for name, found in both.items() if found is not None}
    return texts | describing.describe_code(list(both.values()))


def _restore_best(kept: Checkpoints, state: TrainState, at: Progress) -> TrainState:
    """Returns the best state so far. If its checkpoint is damaged, the next epoch is taken as the best."""
    if not at.best_epoch:
        return state
    try:
        return kept.read(at.best_epoch, state, at.run, allow_changes=True)[0]  # the newest vouches for the run
    except Damaged as error:
        warnings.warn(
            f"{error} The best state so far, of epoch {at.best_epoch}, is lost: the next epoch counts as the best.",
            CheckpointWarning,
            stacklevel=4,
        )
        at.best_epoch, at.stale = 0, 0
        return state


@runtime_checkable
class Compiled(Protocol):
    """What `jax.jit` and `jax.pmap` return."""

    def lower(self, *args: Any, **kwargs: Any) -> Any: ...


def _compile(step: Any, **options: Any) -> Any:
    """Compiles a step, unless its owner did, or mapped it over devices."""
    return step if isinstance(step, Compiled) else jax.jit(step, **options)


def _flatten(half: str, means: Mapping[str, float], metrics: Metrics | None) -> dict[str, float]:
    """Returns the means over steps and the metrics of one half of the history, by key."""
    found = {} if metrics is None else metrics.compute()
    # Arrays, such as a confusion matrix, are left out.
    numbers = {key: float(value) for key, value in found.items() if np.ndim(value) == 0}
    return {join_names(half, key): value for key, value in {**means, **numbers}.items()}


def _print(epoch: int, values: Mapping[str, float], monitor: str) -> None:
    """Prints the two losses and the monitored metric, if there is one."""
    keys = dict.fromkeys((join_names(TRAIN, LOSS), join_names(VALIDATION, LOSS), monitor))
    print(f"epoch {epoch}  " + "  ".join(f"{key} {values[key]:.5g}" for key in keys if key in values))

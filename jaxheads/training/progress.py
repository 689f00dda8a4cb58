"""The progress of `fit`, beside the state of training: epochs, sums, the best value, the history."""

import base64
import builtins
import dataclasses
import functools
import hashlib
import importlib.util
import json
import math
import sys
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.engine.reading import directions
from jaxheads.metrics import Metrics
from jaxheads.metrics.base import LOSS, join_names
from jaxheads.metrics.curves import Interval
from jaxheads.metrics.state import metric_names, read_nothing
from jaxheads.numerics import brief, pairs
from jaxheads.numerics.brief import Shaped
from jaxheads.training.checking import check_batch
from jaxheads.training.processes import aborting

# The first parts of the keys in a history, such as `train/loss` and `validation/auc`.
TRAIN, VALIDATION = "train", "validation"

# What a step may tell beside its loss and metrics. The history gets the number of skipped steps, and the means of
# all else over the other steps.
SKIPPED = "skipped"
TOLD = ("grad_norm", "param_norm", "update_norm", "learning_rate", SKIPPED)

# The class of IPython's shell in the kernel of a notebook.
NOTEBOOK = "ZMQInteractiveShell"


@dataclasses.dataclass
class Progress:
    """The progress of training, beside its state.

    Attributes:
        epoch: the number of finished epochs.
        batch: the number of finished batches in the next epoch.
        sums: the sums over these batches, as float32 pairs: the loss, the metrics, and what else a step tells. None
            before the first batch.
        best_epoch: the best epoch so far, counted from 1; 0 if there is none.
        best_value: the monitored metric of the best epoch.
        stale: how many epochs in a row were not better.
        compared: the monitored metric, and whether a higher value is better.
        history: a dict for each epoch.
        run: texts that identify the run: its head, its optimizer, and the batches of an epoch that is not finished.
    """

    epoch: int = 0
    batch: int = 0
    sums: Any = None
    best_epoch: int = 0
    best_value: float = math.nan
    stale: int = 0
    compared: str = ""
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    run: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, out: Any) -> None:
        """Adds the loss and the metrics of one step, and what else it tells."""
        rows = _count_metrics(out) + 1 + len(tell(out))
        if self.sums is not None and len(self.sums) != rows:
            raise ValueError(
                f"This epoch was begun with {len(self.sums) - 1} sums of metrics, and the step now gives {rows - 1}: "
                "another head, or another with_metrics, with_norms or skip_nonfinite. Go on with the same, or in a new "
                "directory."
            )
        self.sums, self.batch = _add_step(self.sums, out.loss, out.metrics, tell(out)), self.batch + 1

    def read(self, out: Any) -> tuple[dict[str, float], Any]:
        """Returns the mean loss with the means of what else the steps told, by name, and the metrics of all.

        `out` is the output of the last step.
        """
        end = 1 + _count_metrics(out)
        loss, *totals = np.asarray(self.sums, np.float64).sum(-1)[[0, *range(end, len(self.sums))]].tolist()
        told = dict(zip(tell(out), totals, strict=True))
        steps = self.batch - round(told.get(SKIPPED, 0))
        means = {name: total / steps if steps else math.nan for name, total in {LOSS: loss, **told}.items()}
        metrics = None if out.metrics is None else dataclasses.replace(out.metrics, state=self.sums[1:end])
        return means | {name: told[name] for name in told if name == SKIPPED}, metrics

    def end_epoch(self, line: dict[str, float]) -> None:
        """Finishes an epoch, and adds its line to the history."""
        self.epoch, self.batch, self.sums, self.history = self.epoch + 1, 0, None, [*self.history, line]

    def improved(self, monitor: str, higher_is_better: bool) -> bool:
        """Tells whether the last epoch is the best so far, and notes it."""
        value, compared = self.history[-1][monitor], f"{monitor}, {'max' if higher_is_better else 'min'}"
        if compared != self.compared:
            self.best_epoch, self.compared = 0, compared
        best = self.best_value
        better = value > best if higher_is_better else value < best
        better = better or self.best_epoch == 0 or (math.isnan(best) and not math.isnan(value))
        self.stale = 0 if better else self.stale + 1
        if better:
            self.best_epoch, self.best_value = self.epoch, value
        return better

    def check(self, passed: list[Exception]) -> None:
        """Refuses a loss that is not finite. All processes find it, so the error is added to those that pass."""
        if not math.isfinite(total := float(self.sums[0].sum())):
            error = ValueError(
                f"The loss of epoch {self.epoch + 1} is {total}: an illegal label (head.loss(..., check=True) names "
                "it), too large a learning rate, or a network that overflows. No checkpoint holds it."
            )
            passed.append(error)
            raise error

    def to_json(self) -> dict[str, Any]:
        """Returns text and numbers, with a checksum; arrays keep every bit."""
        sums = None if self.sums is None else base64.b64encode(np.asarray(self.sums, "<f4").tobytes()).decode()
        values = {**vars(self), "sums": sums}
        return {**values, CHECKSUM: _sum_of(values)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Progress":
        """Reads the result of `to_json`, or raises `ValueError` if anything has changed in it.

        The first versions wrote no checksum.
        """
        values = dict(values)
        expected = values.pop(CHECKSUM, None)
        if expected is not None and _sum_of(values) != expected:
            raise ValueError("the progress does not fit its checksum")
        if (sums := values["sums"]) is not None:
            sums = np.frombuffer(base64.b64decode(sums), "<f4").reshape(-1, 2)
        return cls(**{**values, "sums": sums})


CHECKSUM = "checksum"


def _sum_of(values: dict[str, Any]) -> str:
    """Returns the checksum of text and numbers; a NaN is a NaN, and an integer is not a float."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def tell(out: Any) -> dict[str, Any]:
    """Returns what a step tells beside its loss and metrics, by name. A step of the user's own may tell nothing."""
    return {name: value for name in TOLD if (value := getattr(out, name, None)) is not None}


def _count_metrics(out: Any) -> int:
    return 0 if out.metrics is None else out.metrics.state.shape[-2]


@jax.jit
def _add_step(sums: jax.Array | None, loss: jax.Array, metrics: Any, told: dict[str, jax.Array]) -> jax.Array:
    """Adds a step to sums over steps. They are compensated pairs: the loss in the first row, the metrics below.

    Of a step that was skipped, only this is counted: its loss and its norms may not be finite.
    """
    metrics = jnp.zeros((0, 1)) if metrics is None else metrics.state
    skipped = told.get(SKIPPED)

    def row(name: str, x: jax.Array) -> jax.Array:
        x = jnp.asarray(x, jnp.float32)
        if skipped is not None and name != SKIPPED:
            x = jnp.where(skipped, jnp.float32(0), x)
        return jnp.pad(jnp.reshape(x, (1, 1)), ((0, 0), (0, metrics.shape[-1] - 1)))

    # A compiled function gets the names sorted.
    rows = [row(name, told[name]) for name in TOLD if name in told]
    both = jnp.concatenate([row(LOSS, loss), metrics, *rows])
    return pairs.add(jnp.zeros_like(both) if sums is None else sums, both)


def mean_loss_and_metrics(state: Any, step: Any, batches: Iterable[Any], key: Any = None) -> tuple[float, Metrics]:
    """Returns the mean loss of batches, and the metrics of all. Each batch folds its own key from `key`, if given."""
    at, out = Progress(), None
    for i, batch in enumerate(batches):
        out = step(state, batch) if key is None else step(state, batch, jax.random.fold_in(key, i))
        at.add(out)
    if out is None or out.metrics is None:
        raise ValueError("There are no batches. Given an empty iterable, or an iterator that was used up: pass a list.")
    means, metrics = at.read(out)
    return means[LOSS], metrics


# These two identify the batches of an epoch that is not finished, in the texts that identify a run.
SHAPES, VALUES = "batches", "first batch"


def describe_first_batch(batch: Any) -> dict[str, str]:
    """Returns texts about the first batch of an epoch: its shapes and the number of processes, and its values.

    Of the values, labels and whole numbers on the host: they tell which rows these are. Other features may be augmented
    at random, anew for the same rows.
    """
    arrays = [x for x in _list_arrays(batch) if isinstance(x, Shaped)]
    shapes = ", ".join(f"[{', '.join(map(str, x.shape))}]" for x in arrays)
    found = {SHAPES: f"{shapes} in {jax.process_count()} process(es)"}
    labels = _list_arrays(batch.get("labels")) if isinstance(batch, Mapping) else []
    told = [x for x in labels if isinstance(x, np.ndarray) and x.dtype.kind in "biuf"]
    told += [x for x in arrays if isinstance(x, np.ndarray) and x.dtype.kind in "biu"]
    # The first process writes the progress, and its own rows with it.
    if told and jax.process_index() == 0:
        crc = functools.reduce(lambda crc, x: zlib.crc32(np.ascontiguousarray(x).reshape(-1).data, crc), told, 0)
        found[VALUES] = f"{crc:08x}"
    return found


def _list_arrays(batch: Any) -> list[Any]:
    if isinstance(batch, Mapping):
        return [x for key in sorted(batch, key=str) for x in _list_arrays(batch[key])]
    return jax.tree.leaves(batch)


def check_first_batch(begun: Mapping[str, str], found: Mapping[str, str], epoch: int) -> None:
    """Refuses to go on within an epoch that was begun with other batches."""
    for name in (SHAPES, VALUES):
        if name in begun and name in found and begun[name] != found[name]:
            what = f"batches of {begun[name]}, and goes on with {found[name]}"
            if name == VALUES:
                what = "other values in its first batch"
            raise ValueError(
                f"Epoch {epoch + 1} was begun with {what}: some rows would be trained on twice, others not at all. "
                "Give the same batches to as many processes (a function of the epoch can shuffle with it as the seed), "
                "or pass allow_changes=True."
            )


@runtime_checkable
class Output(Protocol):
    """What a step of evaluation returns, beside other things."""

    @property
    def loss(self) -> Any: ...

    @property
    def metrics(self) -> Any: ...


_NONE = object()


def check_monitor(monitor: str, higher: bool | None, state: Any, eval_step: Any, validation: Any) -> tuple[str, bool]:
    """Returns the monitor's key in the history, and whether a higher value is better.

    Before training, it refuses an unknown metric, a metric without a direction, and an iterator as validation data.
    """
    if iter(validation) is validation:
        raise ValueError("validation is gone through after every epoch. Given an iterator: pass a list.")
    with aborting([]):  # each process has data of its own
        first = next(iter(validation), _NONE)
        if first is _NONE:
            raise ValueError(
                f"validation must hold batches. Given an empty {type(validation).__name__}. Leave out validation and "
                "eval_step if there is no validation data."
            )
        check_batch(first, eval_step, "The first batch of validation")
    out = jax.eval_shape(eval_step, state, first)
    metrics = out.metrics if isinstance(out, Output) else None
    if not isinstance(metrics, Metrics):
        raise ValueError(f"eval_step must return loss and metrics, as jh.make_eval_step's. Given {brief.tell(out)}.")
    known = [LOSS, *metric_names(metrics.head)]
    # The monitor is a key of the history, or of the metrics.
    keys = {name: key for key in known for name in (key, join_names(VALIDATION, key))}
    if not brief.is_one_of(monitor, keys):
        raise ValueError(f"monitor={monitor!r} is no metric of {metrics.head!r}. Expected one of {known}.")
    key = keys[monitor]
    if key != LOSS and _list_ranks(metrics.head)[key]:
        raise ValueError(
            f"monitor={monitor!r} must be one number, and that metric is an array. Expected one of {known}."
        )
    if higher is None and (higher := {LOSS: False, **directions(metrics.head)}[key]) is None:
        raise ValueError(f"Whether {key!r} is better when high, the metric does not say. Pass higher_is_better=.")
    return join_names(VALIDATION, key), higher


def _list_ranks(head: Any) -> dict[str, int]:
    """Returns the number of axes of each metric."""

    def read(views: Any) -> dict[str, int]:
        values = {join_names(*key): value for key, value in head.read(views).items()}
        return {key: jnp.ndim(x.value if isinstance(x, Interval) else x) for key, x in values.items()}

    return read_nothing(head, read)


def bar_of(batches: Iterable[Any], title: str, progress: bool) -> Iterator[Any]:
    """Returns the batches, with a progress bar if it is wanted and tqdm is installed."""
    if not progress or importlib.util.find_spec("tqdm") is None:
        return iter(batches)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are no widgets: the bar is then of text
        from tqdm.auto import tqdm

    # disable=None: a bar on a terminal, silence in a log. The kernel of a notebook has no terminal, and shows bars.
    disable = False if _is_notebook() else None
    return iter(tqdm(batches, title, leave=False, disable=disable, mininterval=0.5))


def _is_notebook() -> bool:
    """Tells whether this process is the kernel of a notebook. It does not import IPython."""
    known = {**vars(builtins), **({} if (ipython := sys.modules.get("IPython")) is None else vars(ipython))}
    get_shell = known.get("get_ipython")
    return get_shell is not None and any(base.__name__ == NOTEBOOK for base in type(get_shell()).__mro__)

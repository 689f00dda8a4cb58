"""Labels attached to a booster's dataset, for which its `__class__` is swapped. This happens nowhere else.

What is done: `with_labels` sets the attribute `jaxheads_labels` of a dataset, and then its `__class__`: to a subclass
of the library's own class, which is made when it is first needed. The subclass changes a few methods. `slice` (XGBoost)
or `subset` (LightGBM) gives the part that it returns its rows of the labels. `set_label` lets the attached labels go.
`__reduce_ex__` pickles the dataset under the library's own class, because another process cannot import a class that
was made at run time.

Why: `cv` of both libraries cuts a dataset by these methods, and gives only the parts to objective and metric. Without
the subclass the parts have no labels. A wrapper around the dataset, or a new dataset of the subclass, does not do:
the libraries read the dataset's own handle, the data would be held twice, and the caller may have put the dataset
into a list of `evals` already.

Labels that are set later replace the attached ones. There are more ways to set them than `set_label`: `set_field` and
the attribute `label` (LightGBM), `set_float_info` (XGBoost). So the dataset's own column is also kept, and compared
whenever labels are read.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np

DatasetT = TypeVar("DatasetT")


@runtime_checkable
class Dataset(Protocol):
    """The methods of an `xgboost.DMatrix` or a `lightgbm.Dataset` that heads read."""

    def get_label(self) -> Any:
        """Returns the labels."""
        ...

    def get_weight(self) -> Any:
        """Returns the weights; None, or an array without elements, if there are none."""
        ...


@runtime_checkable
class _Sliceable(Dataset, Protocol):
    def set_label(self, label: Any) -> Any: ...
    def slice(self, rindex: Any) -> Any: ...


@runtime_checkable
class _Subsettable(Dataset, Protocol):
    def construct(self) -> Any: ...
    def get_field(self, field_name: str) -> Any: ...
    def set_label(self, label: Any) -> Any: ...
    def subset(self, used_indices: Any) -> Any: ...


class Attached(NamedTuple):
    """Labels and their mask, beside a dataset.

    Attributes:
        labels, where: as `head.loss` takes them.
        own: the dataset's own column when they were attached, float32, each copy; none where it cannot be read yet.
    """

    labels: Any
    where: Any
    own: tuple[np.ndarray, ...] = ()


class Holder:
    """A dataset with attached labels: the base of all classes that are made here.

    Attributes:
        jaxheads_labels: the labels; None after `set_label`.
        jaxheads_busy: whether LightGBM constructs the dataset, and sets the labels that it has already.
    """

    __slots__ = ()
    jaxheads_labels: Attached | None
    jaxheads_busy: bool

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (type(self).__bases__[0],), self.__getstate__()


def with_labels(dataset: DatasetT, labels: Any, where: Any = None) -> DatasetT:
    """Attaches labels to a dataset, in place of the booster's own column. Objective and metric read them.

    Some labels do not fit into the column of a booster: dicts of labels (of a `MultiHead`, or time and event), missing
    labels (`where`), and, in LightGBM, several columns. The Python object of the dataset keeps a copy of the labels.
    Its `slice` or `subset` hands on the labels of the chosen rows, so `cv` works. It pickles if the dataset does.
    LightGBM needs a column of its own too. Give it any column, such as zeros, before: the head reads the attached
    labels. Labels that are set afterwards (`set_label`) replace the attached labels and their mask.

    Rows that no label needs stay in the dataset. Their gradient and Hessian are 0, but they shape the trees: where
    `where` is False, a row takes part in the bins of both libraries, and it counts as a row in LightGBM's leaves
    (`min_data_in_leaf`) and in samples of rows (`subsample`, `bagging_fraction`). So does a row of weight 0, except in
    the bins of XGBoost, which are weighted. Leave such rows out of the dataset where you can. `BoostedHead.fit` does
    so by itself.

    Args:
        dataset: a `xgboost.DMatrix` (or `QuantileDMatrix`), or a `lightgbm.Dataset`.
        labels, where: as `head.loss` takes them. The weights stay the dataset's own.

    Returns:
        `dataset`.

    Raises:
        ValueError: no labels; another kind of dataset (Dask's datasets send no Python object to the workers). The head
            checks the labels when training begins.

    >>> import numpy as np, xgboost
    >>> import jaxheads as jh
    >>> head = jh.MultiHead([jh.BinaryClassHead(name="late"), jh.RegressionHead(name="minutes")])
    >>> data = xgboost.DMatrix(np.array([[0.0], [1.0], [1.0], [0.0]]))
    >>> labels = {"late": np.array([0, 1, 1, 0]), "minutes": np.array([1.0, 20.0, np.nan, 2.0])}
    >>> data = jh.boosting.with_labels(data, labels, where={"minutes": ~np.isnan(labels["minutes"])})
    >>> booster = xgboost.train({"num_target": 2, "base_score": 0}, data, 5, obj=jh.boosting.xgboost_objective(head))
    >>> booster.predict(data, output_margin=True).shape
    (4, 2)
    """
    if labels is None:
        raise ValueError("with_labels needs labels. Given None.")
    if not isinstance(dataset, (_Sliceable, _Subsettable)):
        raise ValueError(
            "with_labels needs an xgboost.DMatrix or a lightgbm.Dataset. The matrices of Dask and Spark send their own "
            "columns to the workers, and no Python object: what is attached to them would be lost. Given a "
            f"{type(dataset).__name__}. There, put the labels into its own columns, DaskDMatrix(..., label=labels)."
        )
    # Rows are prepared once for all rounds: the caller's later changes to the arrays must not reach some of them.
    return _attach(dataset, Attached(copy.deepcopy(labels), copy.deepcopy(where)))


def _attach(dataset: Any, attached: Attached) -> Any:
    if not isinstance(dataset, Holder):
        dataset.__class__ = _make_subclass(type(dataset))
    dataset.jaxheads_labels = _note_own(attached, _read_copies(dataset))
    dataset.jaxheads_busy = False
    return dataset


def _note_own(attached: Attached, copies: list[np.ndarray]) -> Attached:
    # XGBoost hands out a view of its memory.
    return attached._replace(own=tuple(copy.copy() for copy in copies))


def read_labels(dataset: Dataset) -> Any:
    """Returns the labels of a dataset: `Attached`, or its own column if none are attached or if it was set later."""
    attached = dataset.jaxheads_labels if isinstance(dataset, Holder) else None
    copies = _read_copies(dataset)
    if isinstance(dataset, Holder) and attached is not None:
        if not attached.own:
            attached = dataset.jaxheads_labels = _note_own(attached, copies)
        copies = [copy for copy in copies if not any(have_same_values(copy, own) for own in attached.own)]
        if not copies:
            return attached
    return _choose_copy(copies, "label") if copies else dataset.get_label()


def read_weights(dataset: Dataset) -> Any:
    """Returns the weights of a dataset; None if there are none."""
    copies = _read_copies(dataset, "weight")
    weights = _choose_copy(copies, "weight") if copies else dataset.get_weight()
    return None if weights is None or np.size(weights) == 0 else np.asarray(weights)


def _choose_copy(copies: list[np.ndarray], name: str) -> np.ndarray:
    """Returns the one value of several copies, or refuses copies that differ: which one is newer, nobody knows."""
    if any(not have_same_values(copy, copies[0]) for copy in copies):
        raise ValueError(
            f"A lightgbm.Dataset has each {name} twice, and the two copies must be equal. Given other values in its "
            f'attribute {name} than in get_field("{name}"). Set both: dataset.set_{name}(...).'
        )
    return copies[0]


def _read_copies(dataset: Any, name: str = "label") -> list[np.ndarray]:
    """Returns the dataset's own labels or weights as float32. LightGBM has them twice, as attribute and as field.

    `set_field` changes the field alone, which is what the library reads; who assigns the attribute changes that alone.
    A copy that cannot be read yet is left out, such as both copies of a subset before it is constructed.
    """
    if not isinstance(dataset, _Subsettable):
        ways, flatten = (dataset.get_label if name == "label" else dataset.get_weight,), False
    else:
        ways, flatten = (lambda: vars(dataset).get(name), lambda: dataset.get_field(name)), True
    found = []
    for read in ways:
        try:
            column = read()
            if column is not None:
                column = np.asarray(column, np.float32)
                found.append(column.ravel() if flatten else column)
        except Exception:  # LightGBM raises this very class before construction; CuPy's arrays refuse NumPy
            continue
    return found


def have_same_values(a: Any, b: Any) -> bool:
    """Tells whether two values are the same object, or arrays of one dtype with equal values. NaN equals NaN."""
    if a is b:
        return True
    if not (isinstance(a, np.ndarray) and isinstance(b, np.ndarray)) or a.dtype != b.dtype:
        return False
    # A comparison that allows NaN takes three times as long, and NaN is rare.
    return np.array_equal(a, b) or (a.dtype.kind == "f" and np.array_equal(a, b, equal_nan=True))


@functools.cache
def _make_subclass(library: Any) -> Any:
    """Makes the class of a dataset with attached labels, one for each class of the libraries."""
    if issubclass(library, _Subsettable):
        changed = {"subset": _hand_on(library.subset, sorted)}  # LightGBM sorts the rows
        changed["construct"] = _construct_busily(library.construct)
    else:
        changed = {"slice": _hand_on(library.slice, list)}
    changed |= {"set_label": _let_go(library.set_label), "__reduce_ex__": Holder.__reduce_ex__}
    changed |= {"__module__": library.__module__, "__doc__": library.__doc__}
    # The library's class comes first: with another first base Python refuses to swap the class of an object.
    return type(library.__name__, (library, Holder), changed)


def _hand_on(cut: Callable[..., Any], order: Callable[[Any], list[int]]) -> Callable[..., Any]:
    """Returns a method that also attaches the labels of its rows to the part."""

    @functools.wraps(cut)
    def cut_both(self: Any, *args: Any, **kwargs: Any) -> Any:
        rows, part = order(inspect.signature(cut).bind(self, *args, **kwargs).args[1]), cut(self, *args, **kwargs)
        if self.jaxheads_labels is None:
            return part
        attached = read_labels(self)
        if not isinstance(attached, Attached):
            attached = Attached(attached, None)
        part = _attach(part, Attached(take_rows(attached.labels, rows), take_rows(attached.where, rows)))
        # A subset has no column before it is constructed.
        if not part.jaxheads_labels.own:
            own = tuple(copy[rows] for copy in attached.own if copy.size)
            part.jaxheads_labels = part.jaxheads_labels._replace(own=own)
        return part

    return cut_both


def _let_go(set_label: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a `set_label` after which a user's labels are the dataset's own, also if they equal those before."""

    @functools.wraps(set_label)
    def set_own(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = set_label(self, *args, **kwargs)
        if not self.jaxheads_busy:
            self.jaxheads_labels = None
        return found

    return set_own


def _construct_busily(construct: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a `construct` that keeps the attached labels: it calls `set_label` with the labels that it has."""

    @functools.wraps(construct)
    def construct_both(self: Any) -> Any:
        self.jaxheads_busy = True
        try:
            return construct(self)
        finally:
            self.jaxheads_busy = False

    return construct_both


def _rebuild(library: Any) -> Any:
    cls = _make_subclass(library)
    return cls.__new__(cls)


def take_rows(labels: Any, rows: Sequence[int] | np.ndarray) -> Any:
    """Takes some rows of labels or a mask, as they were given: a dict, a list, an array."""
    if labels is None:
        return None
    if isinstance(labels, Mapping):
        return {key: take_rows(value, rows) for key, value in labels.items()}
    return [labels[i] for i in rows] if isinstance(labels, (list, tuple)) else np.asarray(labels)[rows]

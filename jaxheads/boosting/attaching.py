"""Labels attached to a booster's dataset, for which its `__class__` is swapped. This happens nowhere else.

What is done: `with_labels` sets the attribute `jaxheads_labels` of a dataset, and then its `__class__`: to a subclass
of the library's own class, which is made when it is first needed. The subclass changes two methods. `slice` (XGBoost)
or `subset` (LightGBM) gives the part that it returns its rows of the labels. `__reduce_ex__` pickles the dataset under
the library's own class, because another process cannot import a class that was made at run time.

Why: `cv` of both libraries cuts a dataset by these methods, and gives only the parts to objective and metric. Without
the subclass the parts have no labels. A wrapper around the dataset, or a new dataset of the subclass, does not do:
the libraries read the dataset's own handle, the data would be held twice, and the caller may have put the dataset
into a list of `evals` already.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
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
    def slice(self, rindex: Any) -> Any: ...


@runtime_checkable
class _Subsettable(Dataset, Protocol):
    def subset(self, used_indices: Any) -> Any: ...


class Attached(NamedTuple):
    """Labels and their mask, beside a dataset."""

    labels: Any
    where: Any


class Holder:
    """A dataset with attached labels: the base of all classes that are made here."""

    __slots__ = ()
    jaxheads_labels: Attached

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (type(self).__bases__[0],), self.__getstate__()


def with_labels(dataset: DatasetT, labels: Any, where: Any = None) -> DatasetT:
    """Attaches labels to a dataset, in place of the booster's own column. Objective and metric read them.

    Some labels do not fit into the column of a booster: dicts of labels (of a `MultiHead`, or time and event), missing
    labels (`where`), and, in LightGBM, several columns. The Python object of the dataset keeps a copy of the labels.
    Its `slice` or `subset` hands on the labels of the chosen rows, so `cv` works. It pickles if the dataset does.
    LightGBM needs a column of its own too. Give it any column, such as zeros: the head reads the attached labels.

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
        raise ValueError(f"with_labels needs an xgboost.DMatrix or a lightgbm.Dataset. Given {dataset!r}.")
    # Rows are prepared once for all rounds: the caller's later changes to the arrays must not reach some of them.
    return _attach(dataset, Attached(copy.deepcopy(labels), copy.deepcopy(where)))


def _attach(dataset: Any, attached: Attached) -> Any:
    if not isinstance(dataset, Holder):
        dataset.__class__ = _make_subclass(type(dataset))
    dataset.jaxheads_labels = attached
    return dataset


@functools.cache
def _make_subclass(library: Any) -> Any:
    """Makes the class of a dataset with attached labels, one for each class of the libraries."""
    if issubclass(library, _Subsettable):
        changed = {"subset": _hand_on(library.subset, sorted)}  # LightGBM sorts the rows
    else:
        changed = {"slice": _hand_on(library.slice, list)}
    changed |= {"__reduce_ex__": Holder.__reduce_ex__, "__module__": library.__module__, "__doc__": library.__doc__}
    # The library's class comes first: with another first base Python refuses to swap the class of an object.
    return type(library.__name__, (library, Holder), changed)


def _hand_on(cut: Callable[..., Any], order: Callable[[Any], list[int]]) -> Callable[..., Any]:
    """Returns a method that also attaches the labels of its rows to the part."""

    @functools.wraps(cut)
    def cut_both(self: Any, *args: Any, **kwargs: Any) -> Any:
        rows = order(inspect.signature(cut).bind(self, *args, **kwargs).args[1])
        attached = Attached(*(_take_rows(x, rows) for x in self.jaxheads_labels))
        return _attach(cut(self, *args, **kwargs), attached)

    return cut_both


def _rebuild(library: Any) -> Any:
    cls = _make_subclass(library)
    return cls.__new__(cls)


def _take_rows(labels: Any, rows: list[int]) -> Any:
    """Takes some rows of labels or a mask, as they were given: a dict, a list, an array."""
    if labels is None:
        return None
    if isinstance(labels, Mapping):
        return {key: _take_rows(value, rows) for key, value in labels.items()}
    return [labels[i] for i in rows] if isinstance(labels, (list, tuple)) else np.asarray(labels)[rows]

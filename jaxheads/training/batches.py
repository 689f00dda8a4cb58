"""Batches of one size, so that a step compiles once: on one device, on several devices, on several hosts."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxheads.numerics import brief, columns, inputs, missing


def pad_batch(batch: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Fills a batch up to `size` rows: the last batch of an epoch, or an uneven shard.

    The added rows are copies of the last row, so they are legal for the network and as labels. `where` is False there:
    loss, gradient and metrics do not change (only batch norm, in training, sees every row). It runs on the host, in
    NumPy; random keys stay keys. The result always has a `where`, so that every batch has the same structure.

    Columns of a data frame may have missing values (`pandas.NA`, None) in rows that `where` or a weight of 0 hides:
    there they become a value of another row. Elsewhere they are NaN in features, and refused in all else.

    Args:
        batch: `features`, `labels`, and perhaps `weights` and `where`: pytrees of arrays, or data frames, with one row
            for each example. A `where` by head may leave heads out.
        size: the number of rows of the result.

    Raises:
        ValueError: no rows, more than `size`, or arrays with different numbers of rows; missing labels or weights in
            rows that exist.

    >>> import numpy as np
    >>> import jaxheads as jh
    >>> batch = jh.pad_batch({"features": {"x": np.array([[1.0], [2.0]])}, "labels": np.array([1, 0])}, size=3)
    >>> batch["features"]["x"].ravel(), batch["labels"], batch["where"]
    (array([1., 2., 2.]), array([1, 0, 0]), array([ True,  True, False]))
    """
    if not inputs.is_integer(size, 1, 2**31 - 1):
        raise ValueError(f"size must be an integer of at least 1. Given {size!r}.")
    if not isinstance(batch, Mapping):
        raise ValueError(f"A batch must be a dict of features, labels, weights, where. Given {type(batch).__name__}.")
    arrays, n = _read(batch, _to_host)
    if not 0 < n <= size:
        raise ValueError(f"A batch of 1 to {size} rows can be filled up to size={size}. Given {n} rows.")

    def fill(array: Any) -> Any:
        if is_key(array):
            return jax.random.wrap_key_data(
                fill(np.asarray(jax.random.key_data(array))), impl=jax.random.key_impl(array)
            )
        return np.concatenate([array, np.repeat(array[-1:], size - n, axis=0)])

    def exists(where: Any, labels: Any) -> Any:
        if isinstance(where, Mapping):
            if not isinstance(labels, Mapping) or set(where) - set(labels):
                there = sorted(labels) if isinstance(labels, Mapping) else "all, not by head"
                raise ValueError(f"where is given for {sorted(where)}. Given labels for {there}.")
            return {name: exists(where.get(name), inner) for name, inner in labels.items()}
        there = np.ones(n, bool) if where is None else _fill_all(where, (), "where")
        return np.concatenate([there, np.zeros((size - n, *there.shape[1:]), there.dtype)])

    where = arrays.pop("where", None)
    masks = where, arrays.get("weights")
    arrays = {key: _fill_all(value, masks, key) for key, value in arrays.items()}
    return {**jax.tree.map(fill, arrays), "where": exists(where, arrays.get("labels"))}


def _fill_all(value: Any, masks: tuple[Any, ...], what: str) -> Any:
    """Returns an entry of a batch without missing values. `masks` are `where` and `weights`, each one or by head."""
    if isinstance(value, Mapping):
        by_head = not what.startswith("features")

        def inner(key: Any) -> tuple[Any, ...]:
            return tuple(mask.get(key) if by_head and isinstance(mask, Mapping) else mask for mask in masks)

        return {key: _fill_all(x, inner(key), f"{what}[{key!r}]") for key, x in value.items()}
    if not isinstance(value, np.ma.MaskedArray):
        leaves, structure = jax.tree.flatten(value, is_leaf=lambda x: isinstance(x, np.ma.MaskedArray))
        if structure == jax.tree.structure(0):
            return value
        return structure.unflatten([_fill_all(x, masks, what) for x in leaves])
    lost = np.ma.getmaskarray(value)
    # A row of features exists where it does for any head.
    found = lost
    for mask in masks:
        if mask is not None:
            found = found & functools.reduce(np.logical_or, (_spread(x, value.shape) for x in jax.tree.leaves(mask)))
    if found.any():
        if what.startswith("features"):
            return missing.as_floats(value)
        row, n = int(np.argwhere(found)[0][0]), int(found.sum())
        fix = "Fill it, where.fillna(False)." if what == "where" else "Leave the rows out, where=labels.notna()."
        raise ValueError(
            f"{what} must not be missing in rows that exist. Given a missing value in row {row}, {n} in all. {fix}"
        )
    kept = value.data[~lost]
    return np.where(lost, kept[0] if kept.size else np.zeros((), value.dtype), value.data)


def _spread(mask: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Returns where a mask, or weights, let a column exist, in a shape that broadcasts to the column."""
    there = np.ma.filled(mask, 0) != 0
    while there.ndim > len(shape):
        there = there.any(-1)
    there = there.reshape(*there.shape, *[1] * (len(shape) - there.ndim))
    if any(m not in (1, n) for m, n in zip(there.shape, shape, strict=True)):
        there = there.any(tuple(range(1, there.ndim)), keepdims=True)
    return there


def _to_host(x: Any, what: str) -> Any:
    """Returns an array of the host; random keys as they are, and a mask where values of a column are missing."""
    if is_key(x):
        return x
    array = _to_dense(x, what)
    column = missing.read(array if isinstance(x, (list, tuple)) or array.ndim > 1 else x)
    return array if column is None else column


def _to_dense(x: Any, what: str) -> np.ndarray:
    """Returns an array of the host. A column whose rows are lists or arrays becomes one array, if these are alike."""
    try:
        array = np.asarray(x, object if isinstance(x, (list, tuple)) and _has_none(x) else None)
    except ValueError as error:
        raise ValueError(_say_uneven(what, f"a {type(x).__name__} that NumPy cannot convert ({error})")) from error
    if array.dtype != object or not any(isinstance(row, (list, tuple, np.ndarray)) for row in array.flat):
        return array
    rows = [_to_dense(row, what) for row in array.flat]
    if len(shapes := {row.shape for row in rows}) > 1:
        raise ValueError(_say_uneven(what, f"rows of {len(shapes)} shapes: {sorted(shapes)[:3]}"))
    return np.stack(rows).reshape(*array.shape, *rows[0].shape)


def _say_uneven(what: str, given: str) -> str:
    if what.startswith("['labels']"):
        fix = "Encode labels first, on the host: head.encode_labels(labels)."
    else:
        fix = "Fill them up to one length, and keep their lengths in a column of their own, or a mask."
    return f"Each row of {what} must have the same shape, for a step is compiled. Given {given}. {fix}"


def _has_none(x: Any) -> bool:
    return any(map(_has_none, x)) if isinstance(x, (list, tuple)) else x is None


def is_key(x: Any) -> bool:
    """Tells whether a value is an array of random keys, as `jax.random.key` makes them."""
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _to_key_or_dense(x: Any, what: str) -> Any:
    return x if is_key(x) else _to_dense(x, what)


def _to_array(x: Any, what: str) -> Any:
    return x if isinstance(x, jax.Array) else _to_dense(x, what)


def _read(batch: Any, to_array: Callable[[Any, str], Any]) -> tuple[Any, int]:
    """Returns the arrays of a batch, and the number of rows that all arrays have. A data frame becomes its columns."""
    if isinstance(batch, Mapping):
        batch = {key: value if (table := columns.table(value)) is None else table for key, value in batch.items()}
    arrays = jax.tree.map_with_path(
        lambda path, x: to_array(x, jax.tree_util.keystr(path) or "the batch"),
        batch,
        is_leaf=lambda x: isinstance(x, list),
    )
    found = jax.tree.leaves_with_path(arrays)
    shapes = {jax.tree_util.keystr(path) or "the batch": tuple(np.shape(array)) for path, array in found}
    rows = {shape[0] for shape in shapes.values() if shape}
    if len(rows) != 1 or () in shapes.values():
        raise ValueError(f"All arrays of a batch must have the same number of rows. Given shapes {shapes}.")
    return arrays, rows.pop()


def shard_batch(batch: Any, mesh: Mesh, axis_name: str | tuple[str, ...] | None = None) -> Any:
    """Places a batch on a mesh: its rows are cut in equal parts, one for each device.

    Place batches before the step. If `jit(in_shardings=...)` moves an argument instead, the step cannot see that it is
    spread over devices, and gathers it.

    With several processes, each process passes its own rows and gets global arrays. The number of rows must be the same
    in all processes. They compare it whenever it is new, so all processes must call this function for the same steps.

    Args:
        batch: a pytree of arrays with one row for each example, as `pad_batch` takes and returns them.
        mesh: a mesh of devices; with several processes, of the devices of all.
        axis_name: the axis of the mesh, or the axes, over which rows are spread; by default the first.

    Raises:
        ValueError: an axis that the mesh does not have; a number of rows that cannot be divided among the devices, or
            that differs between processes; a mesh on which two processes would have to hold the same rows.

    >>> import jax, numpy as np
    >>> import jaxheads as jh
    >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
    >>> batch = jh.training.shard_batch({"labels": np.zeros(8 * jax.device_count())}, mesh)
    >>> len(batch["labels"].sharding.device_set) == jax.device_count()
    True
    """
    if not isinstance(mesh, Mesh):
        raise ValueError(f"mesh must be a jax.sharding.Mesh, as jax.make_mesh gives it. Given {type(mesh).__name__}.")
    axes = mesh.axis_names[:1] if axis_name is None else axis_name
    names = tuple(axes) if isinstance(axes, (tuple, list)) else (axes,)
    if not names or len(set(names)) < len(names) or set(names) - set(mesh.axis_names):
        raise ValueError(
            f"axis_name must name axes of the mesh, each once. Given {axis_name!r}, expected some of {mesh.axis_names}."
        )
    # A process may also have its own mesh. Then it is the only process.
    processes = len({device.process_index for device in mesh.devices.flat})
    arrays, rows = _read(batch, _to_array if processes == 1 else _to_key_or_dense)
    sharding = NamedSharding(mesh, PartitionSpec(names))
    parts = _count_parts(sharding, math.prod(mesh.shape[name] for name in names))
    refused = None
    if rows % parts:
        refused = ValueError(
            f"Rows are spread over {parts} devices{' of this process' if processes > 1 else ''}, so their number must "
            f"be a multiple of that. Given {rows} rows. Fill the batch up: jh.pad_batch(batch, size)."
        )
    if processes > 1:
        _agree(sharding, -1 if refused else rows // parts)
    if refused:
        raise refused
    if processes == 1:
        return jax.device_put(arrays, sharding)

    def place(x: Any) -> jax.Array:
        if is_key(x):
            return jax.random.wrap_key_data(place(np.asarray(jax.random.key_data(x))), impl=jax.random.key_impl(x))
        return jax.make_array_from_process_local_data(sharding, x)

    return jax.tree.map(place, arrays)


def _count_parts(sharding: NamedSharding, devices: int) -> int:
    """Counts the parts into which the rows of this process are cut. Refuses a mesh on which processes share parts."""
    held: dict[int, set[int]] = {}
    for device, (rows,) in sharding.devices_indices_map((devices,)).items():
        held.setdefault(device.process_index, set()).add(rows.start or 0)
    if sum(map(len, held.values())) > devices:
        raise ValueError(
            f"On this mesh several processes hold the same rows, and each would pass others. Given {sharding.mesh}. "
            "Let the axis of rows vary slowest over the devices, so that the other axes lie within a process."
        )
    return len(held[jax.process_index()]) if len(held) > 1 else devices


_AGREED: set[tuple[NamedSharding, int]] = set()


def _agree(sharding: NamedSharding, rows: int) -> None:
    """Lets all processes fail if one process refuses its rows, or if their numbers of rows for a device differ."""
    devices = set(sharding.device_set)
    if (sharding, rows) in _AGREED or devices != set(jax.devices()):
        return
    from jax.experimental import multihost_utils

    found = multihost_utils.process_allgather(np.asarray(rows)).tolist()
    if rows >= 0 and min(found) != max(found):
        raise ValueError(
            f"All processes must pass as many rows for each of their devices. Given {found} by process (-1: refused "
            "there). Fill batches up to one size: jh.training.lockstep(batches, size)."
        )
    if rows >= 0:
        _AGREED.add((sharding, rows))


_END = object()


def lockstep(batches: Iterable[Mapping[str, Any]], size: int, like: Mapping[str, Any] | None = None) -> Iterator[Any]:
    """Fills batches up to `size` rows, and gives the same number of batches in every process.

    A step on the devices of several processes waits for all processes. If one process had no batch left, the others
    would wait for ever. Here such a process goes on with batches in which no row exists. They count nothing (only batch
    norm, in training, sees them). Before each batch, the processes tell each other whether they have a batch left, and
    whether one of them failed. If one failed, all stop. So all processes must ask for the same number of batches: leave
    the loop early in all processes, or in none.

    Args:
        batches: the batches of this process, as `pad_batch` takes them.
        size: the number of rows of each batch.
        like: a batch with the right shapes, needed if a process may have no batch at all.

    Raises:
        ValueError: in all processes, if one has no batch at all and no `like`, while another has some.
        RuntimeError: if `batches` raises an error in one process. That process raises the error itself, all others
            raise this.

    >>> import numpy as np
    >>> import jaxheads as jh
    >>> batches = ({"features": np.zeros((n, 1)), "labels": np.zeros(n)} for n in (4, 3))
    >>> [batch["where"].tolist() for batch in jh.training.lockstep(batches, size=4)]
    [[True, True, True, True], [True, True, True, False]]
    """
    is_numbers = isinstance(batches, jax.Array) or (isinstance(batches, np.ndarray) and batches.dtype != object)
    if not isinstance(batches, Iterable) or isinstance(batches, type) or is_numbers:
        raise ValueError(f"batches must be a list of batches, or another iterable. Given {brief.tell(batches)}.")
    own, last, begun = iter(()), None, False
    while True:
        batch, error = _END, None
        try:
            if not begun:
                own, last, begun = iter(batches), None if like is None else pad_batch(like, size), True
            batch: Any = next(own, _END)
            if batch is not _END:
                last = pad_batch(batch, size)
        except Exception as raised:
            # It is raised later: now, the other processes would wait for this one in their next step.
            error = raised
        left, shapeless, failed = _ask_all(batch is not _END, last is None, error is not None)
        if error is not None:
            raise error
        if failed:
            raise RuntimeError("Another process failed while it made its batch; its own error says why.")
        if not left:
            return
        if last is None or shapeless:
            raise ValueError("A process has no batch to take the shapes from, and another has. Pass like=a_batch.")
        yield last if batch is not _END else {**last, "where": jax.tree.map(np.zeros_like, last["where"])}


def _ask_all(*flags: bool) -> tuple[bool, ...]:
    """Tells for each flag whether it is True in any process."""
    if jax.process_count() == 1:
        return flags
    from jax.experimental import multihost_utils

    return tuple(np.any(multihost_utils.process_allgather(np.asarray(flags)), axis=0).tolist())

"""The meshes and devices of arrays, as far as their types tell."""

import math
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def explicit_mesh(x: Any) -> Any:
    """Returns the mesh over which `x` is sharded if that mesh has Explicit axes, else None.

    On such a mesh a gather, a scatter and an iota must be told how their result is laid out.
    """
    mesh = jax.typeof(x).sharding.mesh
    return mesh if not mesh.empty and AxisType.Explicit in mesh.axis_types else None


_same = jax.jit(lambda x: x)


def enter(x: Any) -> Any:
    """Returns the same value; an array on an Explicit mesh becomes one of the function that is traced here, if any."""
    return _same(x) if isinstance(x, jax.Array) and not isinstance(x, Tracer) and explicit_mesh(x) else x


def is_off_mesh(x: Any) -> bool:
    """Tells whether the type of `x` knows of no mesh."""
    return jax.typeof(x).sharding.mesh.empty


def is_local(tree: Any) -> bool:
    """Tells whether every leaf is known to live on one device: no mesh, or one whose axes are all mapped by hand."""
    meshes = [jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(tree)]
    return all(mesh.empty or set(mesh.axis_types) == {AxisType.Manual} for mesh in meshes)


def replicated(x: jax.Array) -> jax.Array:
    """Returns `x`, made whole on every device where types say that it is not."""
    mesh = explicit_mesh(x)
    return x if mesh is None else jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*[None] * x.ndim)))


def whole_rows(x: jax.Array) -> jax.Array:
    """Returns `x [..., d]`, with the last axis whole on every device where types say that it is not."""
    mesh, spec = explicit_mesh(x), jax.typeof(x).sharding.spec
    if mesh is None or len(spec) < x.ndim or spec[-1] is None:
        return x
    return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*spec[:-1], None)))


def count_devices(x: jax.Array) -> int:
    """Returns over how many devices the first axis of `x` may be cut, as far as its type tells.

    A type names the Explicit axes that cut it. Any Auto axis of its mesh may cut it too. A Manual one has cut it
    already. An array on no mesh lies on one device, unless `jit(in_shardings=...)` cuts it: no type tells of that
    (`findings/jax_mesh_of_no_mesh_has_no_devices.sh`).
    """
    sharding = jax.typeof(x).sharding
    first = sharding.spec[0] if len(sharding.spec) else None
    named = first if isinstance(first, tuple) else (first,)
    mesh = sharding.mesh
    if mesh.empty:
        return 1
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return math.prod(mesh.shape[name] for name, kind in kinds.items() if name in named or kind == AxisType.Auto)


def check_axis(axis_name: Any) -> None:
    """Refuses a name that no mapped axis has here."""
    given: Any = axis_name
    names = tuple(given) if isinstance(given, (tuple, list)) else (given,)
    if not all(isinstance(name, Hashable) and not isinstance(name, (bool, int, float)) and name for name in names):
        raise ValueError(
            f"axis_name must be the name of a mapped axis, or a tuple of names; None if there is none. Given "
            f"{axis_name!r}."
        )
    try:
        jax.lax.axis_size(axis_name)
    except NameError as error:
        raise ValueError(
            f"axis_name={axis_name!r} is not the name of a mapped axis here. Call this inside jax.shard_map over a "
            "mesh with such an axis, or inside jax.pmap(..., axis_name=...). Under plain jit, arrays that are sharded "
            "over a mesh need no axis_name: leave it out."
        ) from error


def psum(tree: Any, axis_name: Any) -> Any:
    """Returns the sum over the devices of a mapped axis; without an axis, the same values."""
    if axis_name is None:
        return tree
    check_axis(axis_name)
    return jax.lax.psum(tree, axis_name)


def all_rows(x: jax.Array, axis_name: Any) -> jax.Array:
    """Returns `x [..., d]` as rows `[n, d]`, whole on every device: rows of all devices of a mapped axis or a mesh."""
    x = replicated(x)
    x = x.reshape(-1, x.shape[-1])
    if axis_name is None or axis_name == ():
        return x
    check_axis(axis_name)
    return jax.lax.all_gather(x, axis_name, tiled=True)


def varying(tree: Any, axis_name: Any) -> Any:
    """Returns the same values, typed as differing over a mapped axis (inside `shard_map`; elsewhere types do not tell).

    A formula may broadcast a parameter to the shape of the rows before it combines the two. Under the default check,
    the backward pass would then add up its gradient over devices in the shape of the rows. The gradient of a value with
    this type is added up once, in the shape of the parameter.
    """
    if axis_name is None:
        return tree
    check_axis(axis_name)

    def each(x: Any) -> Any:
        for name in _select_manual(axis_name):
            typed = _make_varying(x, name)
            x = x if typed is None else typed
        return x

    return jax.tree.map(each, tree)


def axes_of_rows(x: Any) -> list[str]:
    """Returns the mapped axes of several devices over which `x` may differ, in words.

    Under the default check of `shard_map` its type tells; without the check, and in `pmap`, these are all axes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    names = [name for name in mesh.manual_axes if mesh.shape[name] > 1]
    if all(map(_is_typed, names)):
        names = [name for name in names if any(_make_varying(leaf, name) is None for leaf in jax.tree.leaves(x))]
    return [f"the axis {name!r}" if name.isidentifier() else "an axis without a name" for name in map(str, names)]


def mean_of_gradients(grads: Any, axis_name: Any) -> Any:
    """Returns the gradients of a loss that is over all devices already: their mean over a mapped axis.

    Under the default check of `shard_map` they come out of `grad` added up. A mean would be one more all-reduce of all
    gradients there, for nothing.
    """
    return grads if axis_name is None or _is_typed(axis_name) else jax.lax.pmean(grads, axis_name)


def varies(x: Any, axis_name: Any) -> bool:
    """Tells whether the type of `x` says that it differs over a mapped axis (or one of several)."""
    return _is_typed(axis_name) and any(_make_varying(x, name) is None for name in _select_manual(axis_name))


def _is_typed(axis_name: Any) -> bool:
    """Tells whether types say here over which devices a value varies: then no value can be made to vary twice."""
    return any(_make_varying(_make_varying(jnp.float32(0), name), name) is None for name in _select_manual(axis_name))


def _select_manual(axis_name: Any) -> list[Any]:
    """Returns those of one or several axes that belong to `shard_map` or `pmap`; the axis of a `vmap` does not."""
    names = axis_name if isinstance(axis_name, (tuple, list)) else (axis_name,)
    return [name for name in names if name in jax.sharding.get_abstract_mesh().manual_axes]


def _make_varying(x: Any, name: Any) -> Any:
    """Returns `x` typed as varying; None if it has this type already.

    JAX has renamed the attribute of types that tells this, so the function tries it.
    """
    try:
        return jax.lax.pcast(x, name, to="varying")
    except ValueError:
        return None


def columns(x: jax.Array, dtype: Any) -> jax.Array:
    """Returns the index along the last axis for every entry of `x`, laid out like `x`."""
    return index(x, x.ndim - 1, dtype)


def flat_index(x: jax.Array) -> jax.Array:
    """Returns the row-major position, int32, of every entry of `x`, laid out like `x`."""
    steps = [math.prod(x.shape[axis + 1 :]) for axis in range(x.ndim)]
    return sum((index(x, axis, jnp.int32) * step for axis, step in enumerate(steps)), jnp.int32(0))


def index(x: jax.Array, axis: int, dtype: Any) -> jax.Array:
    """Returns the position along one axis of every entry of `x`, laid out like `x`."""
    out_sharding = None if explicit_mesh(x) is None else jax.typeof(x).sharding
    return jax.lax.broadcasted_iota(dtype, x.shape, axis, out_sharding=out_sharding)

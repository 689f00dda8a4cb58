"""Where arrays lie, as far as their types tell."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType


def explicit_mesh(x: Any) -> Any:
    """The mesh over which `x` is sharded if that mesh has Explicit axes, else None.

    On such a mesh a gather, a scatter and an iota must be told how their result is laid out.
    """
    mesh = jax.typeof(x).sharding.mesh
    return mesh if not mesh.empty and AxisType.Explicit in mesh.axis_types else None


def is_local(tree: Any) -> bool:
    """Whether every leaf is known to live on one device: no mesh, or one whose axes are all mapped by hand."""
    meshes = [jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(tree)]
    return all(mesh.empty or set(mesh.axis_types) == {AxisType.Manual} for mesh in meshes)


def size(x: jax.Array) -> int:
    """Over how many devices `x` may be spread, as far as its type tells."""
    return jax.typeof(x).sharding.mesh.size


def check_axis(axis_name: Any) -> None:
    """Refuses a name that no mapped axis has here."""
    try:
        jax.lax.axis_size(axis_name)
    except NameError as error:
        raise ValueError(
            f"axis_name={axis_name!r} is not the name of a mapped axis here. Call this inside jax.shard_map over a "
            "mesh with such an axis, or inside jax.pmap(..., axis_name=...). Under plain jit, arrays that are sharded "
            "over a mesh need no axis_name: leave it out."
        ) from error


def psum(tree: Any, axis_name: Any) -> Any:
    """The sum over the devices of a mapped axis; without one the same."""
    if axis_name is None:
        return tree
    check_axis(axis_name)
    return jax.lax.psum(tree, axis_name)


def columns(x: jax.Array, dtype: Any) -> jax.Array:
    """The index of the last axis at every entry of `x`, laid out like `x`."""
    return _index(x, x.ndim - 1, dtype)


def flat_index(x: jax.Array) -> jax.Array:
    """The row-major position, int32, of every entry of `x`, laid out like `x`."""
    steps = [math.prod(x.shape[axis + 1 :]) for axis in range(x.ndim)]
    return sum((_index(x, axis, jnp.int32) * step for axis, step in enumerate(steps)), jnp.int32(0))


def _index(x: jax.Array, axis: int, dtype: Any) -> jax.Array:
    out_sharding = None if explicit_mesh(x) is None else jax.typeof(x).sharding
    return jax.lax.broadcasted_iota(dtype, x.shape, axis, out_sharding=out_sharding)

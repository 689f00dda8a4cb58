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

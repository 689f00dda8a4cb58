"""Where arrays lie, as far as their types tell."""

from typing import Any

import jax
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
    out_sharding = None if explicit_mesh(x) is None else jax.typeof(x).sharding
    return jax.lax.broadcasted_iota(dtype, x.shape, x.ndim - 1, out_sharding=out_sharding)

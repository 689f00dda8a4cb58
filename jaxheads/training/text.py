"""Trees of arrays in a few words: shapes and dtypes, and values only where there are few."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

MOST_ARRAYS, MOST_NUMBERS = 8, 8


def describe(tree: Any) -> str:
    """Returns a pytree as text: a few arrays by name, many as their number.

    >>> import numpy as np
    >>> describe({"w": np.zeros((3, 3), np.float32), "b": np.float32(0.5)})
    "{'b': 0.5, 'w': <float32[3, 3]>}"
    """
    leaves = jax.tree.leaves(tree)
    if len(leaves) > MOST_ARRAYS:
        sizes = sum(int(np.prod(np.shape(leaf))) for leaf in leaves)
        return f"<{len(leaves)} arrays, {sizes:,} numbers>"
    if isinstance(tree, Mapping):
        return "{" + ", ".join(f"{key!r}: {describe(tree[key])}" for key in sorted(tree, key=str)) + "}"
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return f"{type(tree).__name__}({', '.join(map(describe, tree))})"
    if isinstance(tree, (list, tuple)):
        inner = ", ".join(map(describe, tree))
        return f"[{inner}]" if isinstance(tree, list) else f"({inner}{',' * (len(tree) == 1)})"
    if len(leaves) == 1 and leaves[0] is tree:
        return _describe_leaf(tree)
    return "None" if tree is None else f"{type(tree).__name__}({', '.join(map(_describe_leaf, leaves))})"


def _describe_leaf(leaf: Any) -> str:
    if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)):
        return f"a {type(leaf).__name__}" if not isinstance(leaf, (bool, int, float)) else repr(leaf)
    dtype, shape = leaf.dtype, list(leaf.shape)
    number = jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)
    if not number or np.prod(shape) > MOST_NUMBERS or not _is_readable(leaf):
        gone = isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and leaf.is_deleted()
        return f"<{dtype}{shape}{', deleted' if gone else ''}>"
    values = np.asarray(leaf)
    if jnp.issubdtype(dtype, jnp.floating):
        values = np.vectorize(lambda x: float(f"{x:.5g}"), otypes=[float])(values.astype(float))
    return str(values.tolist())


def _is_readable(leaf: Any) -> bool:
    """Tells whether an array has values here: no tracer, not donated, not in another process."""
    if not isinstance(leaf, jax.Array):
        return not isinstance(leaf, jax.ShapeDtypeStruct)
    return not isinstance(leaf, Tracer) and not leaf.is_deleted() and leaf.is_fully_addressable

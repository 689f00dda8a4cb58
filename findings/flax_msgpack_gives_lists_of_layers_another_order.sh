#!/usr/bin/env bash
# flax 0.12.8: an nnx model with a list of layers has integer keys (0, 1, ... 11) in its pure dict. What
# `flax.serialization.msgpack_restore` gives back has texts as keys, and texts sort "0", "1", "10", "11", "2". So code
# that takes `jax.tree.leaves` of the restored parameters and puts them into the structure of the model, by their
# places, swaps the weights of equal layers without an error. With ten layers or fewer nothing happens.
# Keys must be compared by name: `nnx.replace_by_pure_dict` of a dict whose texts were made integers again.
#
# Seen with flax 0.12.8, jax 0.10.1:
#   11 layers: keys by place ['0', '1', '10', '2', ...], 9 of 11 kernels are those of another layer
# It fails if places and names agree. Needs Python 3.11 to 3.13.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet flax==0.12.8 jax==0.10.1
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PY'
import jax
import numpy as np
from flax import nnx, serialization


def count_swapped(layers):
    model = nnx.Sequential(*[nnx.Linear(1, 1, use_bias=False, rngs=nnx.Rngs(i)) for i in range(layers)])
    state = nnx.state(model, nnx.Param)
    pure = jax.tree.map(np.asarray, nnx.to_pure_dict(state))
    stored = serialization.msgpack_serialize(serialization.to_state_dict(pure))
    restored = serialization.msgpack_restore(stored)
    (inner,) = restored.values()
    before, after = jax.tree.leaves(pure), jax.tree.leaves(restored)
    swapped = sum(bool((a != b).any()) for a, b in zip(before, after, strict=True))
    print(f"{layers} layers: keys by place {sorted(inner)[:4]}, {swapped} of {layers} kernels are those of another layer")
    return swapped


assert count_swapped(10) == 0
assert count_swapped(11) == 9
PY

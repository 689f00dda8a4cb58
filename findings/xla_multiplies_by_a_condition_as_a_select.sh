#!/usr/bin/env bash
# jit changes what NaN times 0 is. A product with a condition that was cast to a float, `x * mask.astype(float32)`, is NaN
# where x is NaN and the mask False, as IEEE 754 says, if it is computed eagerly. Under jit it is 0: XLA rewrites the product
# to a select. With the same zeros given as a float32 argument it stays NaN under jit too. So a mask that multiplies seems
# to hide NaN in compiled code, and stops hiding it as soon as the mask comes as floats, or from another computation.
#
# Versions: jax and jaxlib 0.10.1, CPU. Output seen:
#   eager:        [nan nan  1.]
#   jit, cast:    [0. 0. 1.]
#   jit, floats:  [nan nan  1.]
# jax 0.12.0.1 does the same.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.1 jaxlib==0.10.1
cat >"$folder/probe.py" <<'PROBE'
import jax
import jax.numpy as jnp
import numpy as np

x, mask = jnp.array([jnp.nan, jnp.inf, 1.0]), jnp.array([False, False, True])


def cast(x, mask):
    return x * mask.astype(jnp.float32)


eager, compiled = np.asarray(cast(x, mask)), np.asarray(jax.jit(cast)(x, mask))
floats = np.asarray(jax.jit(lambda x, m: x * m)(x, mask.astype(jnp.float32)))
print("eager:       ", eager)
print("jit, cast:   ", compiled)
print("jit, floats: ", floats)
assert np.isnan(eager[:2]).all() and np.isnan(floats[:2]).all()
assert (compiled == [0, 0, 1]).all()
PROBE
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/probe.py"

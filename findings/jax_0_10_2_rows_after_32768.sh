#!/usr/bin/env bash
# jax 0.10.2 on a CPU: a compiled network that is mapped over rows is wrong from row 32,768 on, without any error.
#
# What one expects: `jit(vmap(f))` gives what `vmap(f)` gives. What happens, if `f` multiplies a 2 x 3 matrix by a row
# and sums the squares: of 33,000 rows, all 232 after the 32,768th are wrong by up to several units. Eagerly, with one
# feature more, or under jax 0.10.1 they are right. jax 0.10.2 is the last jax that Python 3.11 can install.
# Reported upstream as jax-ml/jax#39103 (that report is of 3 x 3 matrices). jaxheads excludes this version.
#
# It prints the number of wrong rows, and the first of them, and fails if that changes. Needs Python 3.11 to 3.13.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
cat >rows.py <<'EOF'
import jax
import jax.numpy as jnp
import numpy as np

rng = np.random.default_rng(0)
for width in (3, 4):
    features = rng.normal(size=(33_000, width)).astype(np.float32)
    matrix = rng.normal(size=(2, width)).astype(np.float32)
    network = jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2))
    exact = ((features.astype(np.float64) @ matrix.T) ** 2).sum(-1)
    for name, call in (("eager", network), ("jit", jax.jit(network))):
        wrong = np.flatnonzero(np.abs(call(features) - exact) > 1e-3)
        print(f"{width} features, {name}: {len(wrong)} wrong, from {wrong[:1].tolist()}")
EOF
found() {
    python3 -m venv "$1"
    "$1/bin/pip" install --quiet "jax==$1" "jaxlib==$1"
    echo "jax $1"
    JAX_PLATFORMS=cpu "$1/bin/python" rows.py | tee "$1.log"
}
found 0.10.1
found 0.10.2
[ "$(grep -c ': 0 wrong' 0.10.1.log)" -eq 4 ]
[ "$(grep -c ': 0 wrong' 0.10.2.log)" -eq 3 ]
grep -q '3 features, jit: [1-9][0-9]* wrong, from \[32768\]' 0.10.2.log

#!/usr/bin/env bash
# jax 0.10.1 on a CPU: a float32 sum over axes that are all shorter than 32 is far less exact than one over a long axis.
#
# What one expects: the same numbers have nearly the same sum in any shape, as in NumPy. What happens: XLA sums in
# blocks of 32 along each axis. Along shorter axes it adds one number after the other. The sum of the 810,000 positive
# numbers of [30, 30, 30, 30] has a relative error above 1e-5; the sum of the same numbers as [810000] has one below
# 1e-6. A reshape inside the compiled function does not help, because XLA removes it. Under jax 0.10.2 both sums are
# exact.
#
# It prints the relative errors, and fails if that changes. Needs Python 3.11 to 3.13.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
cat >sums.py <<'EOF'
import jax
import jax.numpy as jnp
import numpy as np

rng = np.random.default_rng(0)
x, y = rng.normal(size=(2, 30, 30, 30, 30)).astype(np.float32)
exact = ((x.astype(np.float64) - y) ** 2).sum()
plain = jax.jit(lambda x, y: jnp.sum((x - y) ** 2))
inside = jax.jit(lambda x, y: jnp.sum(((x - y) ** 2).reshape(-1)))
found = {"one axis": plain(x.ravel(), y.ravel()), "four axes": plain(x, y), "reshaped inside": inside(x, y)}
for name, value in found.items():
    error = abs(float(value) / exact - 1)
    print(f"{name}: {error:.1e}", "exact" if error < 1e-6 else "far off" if error > 1e-5 else "in between")
error = abs(float(((x - y) ** 2).sum()) / exact - 1)
print(f"NumPy, four axes: {error:.1e}", "exact" if error < 1e-6 else "not exact")
EOF
found() {
    python3 -m venv "$1"
    "$1/bin/pip" install --quiet "jax==$1" "jaxlib==$1"
    echo "jax $1"
    JAX_PLATFORMS=cpu "$1/bin/python" sums.py | tee "$1.log"
}
found 0.10.1
found 0.10.2
[ "$(grep -c ' exact$' 0.10.1.log)" -eq 2 ]
[ "$(grep -c 'far off' 0.10.1.log)" -eq 2 ]
grep -q '^one axis: .* exact' 0.10.1.log
[ "$(grep -c ' exact$' 0.10.2.log)" -eq 4 ]

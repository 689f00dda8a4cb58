#!/usr/bin/env bash
# jax 0.10.1: the type of an array that lies on one device has a mesh of size 0, not 1; and jit(in_shardings=...) hides
# the mesh from the types inside.
#
# What one expects: `jax.typeof(x).sharding.mesh.size` counts the devices that may hold a part of x, and so is 1 where
# there is no mesh (a mesh without axes has one place, as the product over no axes is 1). What happens: it is 0. Code
# that multiplies by it, or divides a batch by it, goes wrong on one device only: gcd(rows, 64 * 0) is the number of
# rows. Inside jit the size is 8 for an argument that was put on eight devices before. For the same rows as a NumPy
# array, cut over the same eight devices by in_shardings, it is 0 again.
#
# It prints the sizes, and fails if that changes. Needs Python 3.11 to 3.13.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
cat >sizes.py <<'EOF'
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

jax.config.update("jax_num_cpu_devices", 8)


def size(x):
    return jax.typeof(x).sharding.mesh.size


def rows_over(mesh):
    return NamedSharding(mesh, PartitionSpec("d"))


one, eight = (jax.make_mesh((n,), ("d",), (AxisType.Auto,), devices=jax.devices()[:n]) for n in (1, 8))
rows = np.zeros(8, np.float32)
print("no mesh:", size(jnp.asarray(rows)), jax.jit(size)(rows))
print("a mesh of one device:", size(jax.device_put(rows, rows_over(one))))
print("eight devices, put there before jit:", jax.jit(size)(jax.device_put(rows, rows_over(eight))))
cut = jax.jit(lambda x: (x + 1, size(x)), in_shardings=rows_over(eight))
out, found = cut(rows)
print("eight devices, by in_shardings:", found, "of an array on", len(out.sharding.device_set))
EOF
python3 -m venv venv
venv/bin/pip install --quiet jax==0.10.1 jaxlib==0.10.1
JAX_PLATFORMS=cpu venv/bin/python sizes.py | tee found
diff found - <<'EOF'
no mesh: 0 0
a mesh of one device: 1
eight devices, put there before jit: 8
eight devices, by in_shardings: 0 of an array on 8
EOF

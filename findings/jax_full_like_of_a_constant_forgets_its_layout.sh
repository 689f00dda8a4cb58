#!/usr/bin/env bash
# jax 0.10.1, Explicit sharding: inside jit, full_like of a sharded array that the function closes over forgets how the
# array is laid out.
#
# What one expects: full_like(x, 0) has the layout of x, as it has if x is an argument, and as x[:, None] has. What
# happens: jax.typeof(x) says that x is split over "d", but full_like(x, 0) is typed as not split at all. So
# jax.lax.select_n(x > 0, x, full_like(x, 0)), which is right for an argument, raises ShardingTypeError for a constant.
# An identity function that is compiled for itself, jax.jit(lambda x: x)(x), helps.
#
# It prints the types, and fails if that changes. Needs Python 3.11 to 3.13.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet "jax==0.10.1" "jaxlib==0.10.1"
cat >layouts.py <<'EOF'
import jax

jax.config.update("jax_num_cpu_devices", 2)
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

mesh = jax.make_mesh((2,), ("d",), (AxisType.Explicit,))
same = jax.jit(lambda x: x)


def spec(x):
    return jax.typeof(x).sharding.spec


def tell(kind, x):
    print(kind, "itself", spec(x))
    print(kind, "full_like", spec(jax.lax.full_like(x, 0)))
    print(kind, "reshaped", spec(x[:, None]))
    print(kind, "through jit", spec(jax.lax.full_like(same(x), 0)))


with jax.set_mesh(mesh):
    x = jax.device_put(jnp.arange(4.0), NamedSharding(mesh, PartitionSpec("d")))

    @jax.jit
    def of_argument(x):
        tell("argument", x)
        return jax.lax.select_n(x > 0, x, jax.lax.full_like(x, 0))

    @jax.jit
    def of_constant(s):
        tell("constant", x)
        return s * jax.lax.select_n(x > 0, x, jax.lax.full_like(x, 0))

    of_argument(x)
    try:
        of_constant(2.0)
    except Exception as error:
        print("constant raised", type(error).__name__)
EOF
JAX_PLATFORMS=cpu venv/bin/python layouts.py | tee found
for name in "itself" "full_like" "through jit"; do grep -q "^argument $name P('d',)" found; done
grep -q "^argument reshaped P('d', None)" found
grep -q "^constant reshaped P('d', None)" found
grep -q "^constant itself P('d',)" found
grep -q "^constant full_like P(None,)" found
grep -q "^constant through jit P('d',)" found
grep -q "^constant raised ShardingTypeError" found

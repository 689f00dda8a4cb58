#!/usr/bin/env bash
# optax 0.2.8: a cosine schedule changes what it holds when it is first called or traced.
#
# What one expects: a schedule is a pure function of the step, and stays as it was made. What happens:
# optax.cosine_decay_schedule assigns to a variable of the function around it, so the integer decay_steps becomes a
# float. warmup_cosine_decay_schedule holds one and does the same. A program that compares, hashes or prints what a
# schedule holds sees another schedule after the first step of training. linear_schedule stays as it is.
#
# It prints what the schedules hold before and after a call, and fails if that changes. Needs Python 3.11 to 3.13.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet "jax==0.10.1" "jaxlib==0.10.1" "optax==0.2.8"
cat >holds.py <<'EOF'
import optax


def held(function):
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {name: cell.cell_contents for name, cell in cells if isinstance(cell.cell_contents, (int, float))}


for name, schedule in {
    "cosine": optax.cosine_decay_schedule(0.1, 100),
    "linear": optax.linear_schedule(0.1, 0.0, 100),
}.items():
    before = repr(held(schedule))
    schedule(3.0)
    after = repr(held(schedule))
    print(name, "changed" if before != after else "same", before, after)
EOF
JAX_PLATFORMS=cpu venv/bin/python holds.py | tee found
grep -q "^cosine changed .*'decay_steps': 100,.*'decay_steps': 100.0" found
grep -q "^linear same" found

#!/usr/bin/env bash
# LightGBM 4.7: after Dataset.set_field("label", ...), training uses the new labels, and get_label() returns the old ones.
#
# What one expects: get_label() returns the labels that training uses, as get_field("label") does. What happens:
# set_field changes the data of the library alone. get_label() returns the Python attribute `label`, which keeps the
# labels of the constructor. So an objective or a metric in Python that reads get_label() (as the documentation shows)
# sees other labels than the trees. set_label() changes both.
#
# It prints both answers and what one tree predicts, and fails if that changes. Needs Python 3.11 to 3.13.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet lightgbm==4.7.0 numpy==2.4.6 scipy==1.17.1
cat >labels.py <<'EOF'
import lightgbm
import numpy as np

x = np.random.default_rng(0).normal(size=(200, 2))
old, new = np.zeros(200, np.float32), np.full(200, 5, np.float32)


def read(how):
    data = lightgbm.Dataset(x, old, params={"verbosity": -1}).construct()
    getattr(data, how[0])(*how[1:])
    booster = lightgbm.train({"objective": "regression", "verbosity": -1}, data, 1)
    return data.get_label()[0], data.get_field("label")[0], booster.predict(x[:1])[0]


for how in (("set_field", "label", new), ("set_label", new)):
    label, field, predicted = read(how)
    print(f"{how[0]}: get_label {label:g}, get_field {field:g}, predicted {predicted:g}")
EOF
env/bin/python labels.py | tee found.log
grep -qx 'set_field: get_label 0, get_field 5, predicted 5' found.log
grep -qx 'set_label: get_label 5, get_field 5, predicted 5' found.log

#!/usr/bin/env bash
# XGBoost 3.2.0 on PySpark 4.3.0 (Python 3.11, Java 17): SparkXGBRegressor takes a Python function as `obj` and trains
# with it. Neither the estimator nor its model can be saved afterwards: Spark's writer makes JSON of all parameters, and
# raises TypeError, "Object of type function is not JSON serializable". The booster inside the model can be saved.
# The documentation of `obj` does not say so; a job fails after hours of training, in its last line.
# Seen: "model: TypeError: Object of type function is not JSON serializable", the same of the estimator, "booster: saved".
# The script fails if that changes. It needs Java.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet pyspark==4.3.0 xgboost-cpu==3.2.0 pandas==2.3.3 scikit-learn==1.9.1 pyarrow==26.0.1
cat >run.py <<'PY'
import numpy as np
import pandas as pd
from pyspark.sql import SparkSession
from xgboost.spark import SparkXGBRegressor

spark = SparkSession.builder.master("local[2]").getOrCreate()
table = pd.DataFrame({"x": np.arange(200.0), "y": np.arange(200.0) % 7})


def squared(margins, matrix):
    return margins - matrix.get_label(), np.ones_like(margins)


estimator = SparkXGBRegressor(features_col=["x"], label_col="y", num_workers=1, n_estimators=2, obj=squared)
model = estimator.fit(spark.createDataFrame(table))
for name, part in (("model", model), ("estimator", estimator)):
    try:
        part.write().overwrite().save(f"saved_{name}")
        print(f"{name}: saved")
    except TypeError as error:
        print(f"{name}: TypeError: {error}")
model.get_booster().save_model("booster.json")
print("booster: saved")
PY
PATH="$PWD/venv/bin:$PATH" venv/bin/python run.py 2>errors.txt | tee found.txt || { tail -n 5 errors.txt; exit 1; }
diff found.txt - <<'SEEN'
model: TypeError: Object of type function is not JSON serializable
estimator: TypeError: Object of type function is not JSON serializable
booster: saved
SEEN

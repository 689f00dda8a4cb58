"""Reads the golden files, builds the heads they ask for, and counts the cases."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import gzip
import json
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

import jaxheads as jh
from goldens.callables import LINK_FNS, LOSS_FNS, NumericColumn
from goldens.differs import DIFFERS

HERE = pathlib.Path(__file__).parent

# A family of simple heads is one more name here, and its file beside this one.
FAMILIES = ("regression", "binary_class", "multi_class", "keras_metrics")

# The test that a case of each kind goes through.
TEST_OF_KIND = {
    "case": "test_behaviour",
    "error": "test_refusal",
    "keras_auc": "test_keras_auc",
    "keras_threshold": "test_keras_threshold",
}


class SparseTensor:
    """What TensorFlow had where there is no sparse tensor here: three arrays and no `__array__`."""

    def __init__(self, indices, values, dense_shape):
        self.indices, self.values, self.dense_shape = indices, values, dense_shape


def flatten(nested) -> list:
    if not isinstance(nested, list):
        return [nested]
    return [leaf for item in nested for leaf in flatten(item)]


def decode(value) -> Any:
    """An encoded array, dict of arrays or sparse tensor as NumPy; `None` stays `None`."""
    if value is None:
        return None
    if "dict" in value:
        return {key: decode(item) for key, item in value["dict"].items()}
    if "sparse" in value:
        sparse = value["sparse"]
        return SparseTensor(
            np.asarray(sparse["indices"], np.int64).reshape(-1, len(sparse["dense_shape"])),
            decode(sparse["values"]),
            tuple(sparse["dense_shape"]),
        )
    leaves, dtype = flatten(value["data"]), value["dtype"]
    if dtype == "string":
        return np.asarray(leaves, np.str_).reshape(value["shape"])
    if dtype.startswith("float"):
        leaves = [float(leaf) for leaf in leaves]
    return np.asarray(leaves, dtype).reshape(value["shape"])


def scalar(value) -> np.float32:
    return np.float32(float(value))


@dataclasses.dataclass(frozen=True)
class Batch:
    features: dict[str, Any] | None
    labels: Any
    logits: Any
    regularization_losses: list[float] | None

    @property
    def inputs(self) -> dict[str, Any]:
        """By the names of `loss`, `measure` and `update_metrics`."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def arrays(self) -> dict[str, Any]:
        """Those of the inputs that have a row for each example."""
        return {"features": self.features, "labels": self.labels, "logits": self.logits}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One golden case; `raw` is its line of the file."""

    raw: dict[str, Any]

    @property
    def id(self) -> str:
        return self.raw["id"]

    @property
    def family(self) -> str:
        return self.id.split("/")[0]

    @property
    def kind(self) -> str:
        return self.raw["kind"]

    @property
    def tags(self) -> list[str]:
        return self.raw.get("tags", [])

    @property
    def expected(self) -> dict[str, Any]:
        return self.raw["expected"]

    @property
    def test(self) -> str:
        return TEST_OF_KIND[self.kind]

    @property
    def required(self) -> bool:
        return self.id not in DIFFERS

    @property
    def regularized(self) -> bool:
        return self.raw["batches"][0]["regularization_losses"] is not None

    @functools.cached_property
    def batches(self) -> list[Batch]:
        encoded = self.raw["batches"] if "batches" in self.raw else [self.raw["batch"]]
        return [
            Batch(
                None if batch["features"] is None else {key: decode(value) for key, value in batch["features"].items()},
                decode(batch["labels"]),
                decode(batch["logits"]),
                batch["regularization_losses"],
            )
            for batch in encoded
        ]

    @functools.cached_property
    def soft(self) -> bool:
        """Whether this is a classifier's case with a label strictly between 0 and 1."""
        if self.kind == "error" or self.raw.get("head") == "RegressionHead":
            return False
        labels = [decode(batch["labels"]) for batch in self.raw["batches"]]
        arrays = [array for array in labels if isinstance(array, np.ndarray)]
        return any(array.dtype.kind == "f" and bool(np.any((array > 0) & (array < 1))) for array in arrays)


@functools.cache
def read(name: str) -> dict[str, Any]:
    return json.loads(gzip.decompress((HERE / f"{name}.json.gz").read_bytes()))


@functools.cache
def load(family: str) -> tuple[Case, ...]:
    return tuple(Case(raw) for raw in read(family)["cases"])


def all_cases() -> tuple[Case, ...]:
    return tuple(case for family in FAMILIES for case in load(family))


@functools.cache
def by_id() -> dict[str, Case]:
    return {case.id: case for case in all_cases()}


def argument(value) -> Any:
    """A constructor argument as Python, from the file's way of writing it."""
    if isinstance(value, list):
        return [argument(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "head" in value:
        return build(value)
    ((tag, content),) = value.items()
    if tag == "$loss_fn":
        return LOSS_FNS[content]
    if tag == "$link_fn":
        return LINK_FNS[content]
    if tag == "$numeric_column":
        return NumericColumn(content["key"], content["normalizer"])
    if tag == "$dict":
        return {key: argument(item) for key, item in content.items()}
    return {"$tuple": tuple, "$set": set}[tag](argument(content))


def build(spec: dict[str, Any], **replaced: Any) -> Any:
    """The head of a spec, `replaced` taking the place of arguments, on TensorFlow's thresholds."""
    arguments = {key: argument(value) for key, value in spec["kwargs"].items()}
    head = getattr(jh, spec["head"])(**(arguments | replaced))
    if any(field.name == "bins" for field in dataclasses.fields(head)):
        head = dataclasses.replace(head, bins=jh.ThresholdGrid(200))
    return head


def expand(run_lengths) -> np.ndarray:
    """The vector behind `[[value, count], ...]`."""
    return np.concatenate([np.full(count, value, np.float64) for value, count in run_lengths])


def excused_ids() -> set[str]:
    """The ids, of the families here, that may differ from TensorFlow and why is written down.

    `excused.json` names them by id or pattern, soft labels by description; `accident` is a tag.
    """
    differs, last_bit, refused, _, accepted = read("excused").values()
    patterns = [name for text in differs for name in text.split(", ")]
    patterns += [*last_bit, *refused, *accepted]
    return {
        case.id
        for case in all_cases()
        if "accident" in case.tags or case.soft or any(fnmatch.fnmatchcase(case.id, pattern) for pattern in patterns)
    }


def golden_summary(passed: Iterable[str] | None = None) -> str:
    """One line that counts the cases; with the node ids of passed tests, how many of them passed.

    Empty when `passed` holds no golden test at all.
    """
    counted = required = [case for case in all_cases() if case.required]
    of = ""
    if passed is not None:
        names = {node.rpartition("::")[2] for node in passed if "test_goldens.py::" in node}
        if not names:
            return ""
        counted = [case for case in required if f"{case.test}[{case.id}]" in names]
        of = f"{len(counted)} of "
    parts = ", ".join(f"{family} {sum(case.family == family for case in counted)}" for family in FAMILIES)
    return f"goldens: {of}{len(required)} required cases ({parts}); {len(DIFFERS)} differ on purpose"

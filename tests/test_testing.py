"""`jaxheads.testing.check_head`: it passes the heads that are right, and names the law that a broken one breaks."""

import dataclasses
import re
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from zoo import SHAPED, ZOO, CoxHead, times

import jaxheads as jh
from jaxheads.testing import check_head, laws
from jaxheads.testing.case import Case

ABSENCE, WEIGHTS = "where=False is absence", "a weight of 0 hides, a weight of 2 is twice"
DEVICES, EXTREMES = "devices do not matter", "extreme logits and empty batches are harmless"


# Heads that are right.


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPED)
def test_heads_of_other_shapes_obey_the_laws(name):
    given = SHAPED[name]
    report = check_head(given.head, given.labels, given.oracle, devices=jax.devices()[:8], raises=False)
    if name == "ctc":
        # The loop inside optax' ctc_loss begins with constants, which the default check of shard_map refuses.
        (found,) = report.broken
        assert found.law == DEVICES
        assert re.fullmatch(r"shard_map: scan body function carry(.|\n)*", found.broken)
        report = dataclasses.replace(report, findings=tuple(set(report.findings) - {found}))
    assert not report.broken, report


@pytest.mark.parametrize(
    ("name", "devices"),
    [
        pytest.param(name, n, marks=[] if (name, n) == ("listwise", 2) else pytest.mark.slow)
        for name in SHAPED
        for n in (2, 4)
        if name != "ctc"
    ],
)
def test_heads_of_other_shapes_obey_the_law_of_devices(name, devices):
    """On eight devices and on one it is a part of the test above."""
    given = SHAPED[name]
    laws.devices_do_not_matter(Case.of(given.head, given.labels, None, 6), jax.devices()[:devices])


def test_lazy_logits_are_their_product():
    given = SHAPED["retrieval"]
    laws.lazy_logits_are_their_product(Case.of(given.head, given.labels, None, 4))


# `test_laws.py` runs these laws on every head of the zoo. Here is the whole of `check_head`, with an oracle.
@pytest.mark.slow
def test_a_head_of_the_zoo_obeys_the_laws():
    entry = next(entry for entry in ZOO if entry.name == "survival")
    count = entry.count
    assert count is not None

    def oracle(labels, logits):
        return entry.losses(labels, logits, entry.params()), count(labels)

    check_head(entry.head, entry.labels, oracle, devices=())


# Heads that are broken, as authors have written them.


class RowlessContrastiveHead(jh.Head):
    """In-batch contrastive loss without `rows`: keys of hidden rows and of other devices are not seen."""

    logits_dimension = 4

    label_spec = MappingProxyType({})
    coupling = "batch"

    def losses(self, labels, logits):
        query, key = logits[..., :2], logits[..., 2:]
        return jax.nn.logsumexp(query @ key.T, -1, keepdims=True) - jnp.sum(query * key, -1, keepdims=True)


class RowlessCoxHead(CoxHead):
    """Partial likelihood without `rows`."""

    def losses(self, labels, logits):  # pyright: ignore[reportIncompatibleMethodOverride]  # what is tested
        at_risk = (labels["time"].T >= labels["time"]).astype(jnp.float32)
        log_risk = jax.nn.logsumexp(logits.T, -1, b=at_risk, keepdims=True)
        events = labels["event"].astype(jnp.float32)
        return jh.Term(events * (log_risk - logits), events)


class ScaledLogHead(jh.Head):
    """A learned scale times a logarithm that is infinite at the fill: masked rows must not reach the scale."""

    scale: jax.Array = jh.learned(lambda head, key: jnp.ones(()))
    logits_dimension = 1
    coupling = "row"

    def losses(self, labels, logits):
        return (self.scale * jnp.log(jnp.abs(labels)) - logits) ** 2


class MaskedMeanHead(jh.Head):
    """A mean over rows that are there, of this device alone."""

    logits_dimension = 1
    coupling = "batch"

    def losses(self, labels, logits, rows):
        mean = jnp.sum(logits * rows.weights) / jnp.maximum(jnp.sum(rows.weights), 1)
        return (labels - logits + mean) ** 2


class HalfPrecisionHead(jh.Head):
    """Squared error in bfloat16."""

    logits_dimension = 1
    coupling = "row"

    def losses(self, labels, logits):
        return ((labels - logits).astype(jnp.bfloat16) ** 2).astype(jnp.float32)


class OverflowingHead(jh.Head):
    """Cross-entropy by its definition, not by its stable form."""

    logits_dimension = 1
    label_spec = jh.LabelSpec(1, "float", 0, 1)
    coupling = "row"

    def losses(self, labels, logits):
        p = 1 / (1 + jnp.exp(-logits))
        return -labels * jnp.log(p) - (1 - labels) * jnp.log(1 - p)


class LenientHead(jh.Head):
    """A loss that turns the NaN of an illegal label into 0."""

    logits_dimension = 1
    coupling = "row"

    def losses(self, labels, logits):
        return jax.lax.stop_gradient((labels - logits) ** 2)


class UnequalHead(jh.Head):
    """A field that is another function whenever the head is built."""

    scale: Any = None
    logits_dimension = 1
    coupling = "row"

    def validate(self):
        object.__setattr__(self, "scale", lambda x: x)

    def losses(self, labels, logits):
        return self.scale(labels - logits) ** 2


class UnsignedHead(jh.Head):
    """A loss that may be negative."""

    logits_dimension = 1
    coupling = "row"

    def losses(self, labels, logits):
        return logits - labels


class OverflowingMeanHead(jh.Head):
    """A prediction that is `inf / inf` at large logits."""

    logits_dimension = 1
    coupling = "row"

    def losses(self, labels, logits):
        return (labels - logits) ** 2

    def outputs(self, logits):
        return {"mean": jnp.exp(logits) / (1 + jnp.exp(logits))}


class MaskForgettingHead(jh.Head):
    """A margin to the other rows, hidden ones too: at large logits it is flat, and nothing shows."""

    logits_dimension = 2
    label_spec = MappingProxyType({})
    coupling = "batch"

    def losses(self, labels, logits, rows):
        flat, others = logits.reshape(-1, 1, 2), rows.devices.all(logits)
        squared = jnp.sum((flat - others[None]) ** 2, axis=-1)
        return jnp.sum(jnp.maximum(0.05 - squared, 0), axis=-1).reshape(*logits.shape[:-1], 1)


@pytest.mark.parametrize(
    ("head", "broken", "given"),
    [
        pytest.param(RowlessContrastiveHead(), {ABSENCE, WEIGHTS, DEVICES}, {}, marks=pytest.mark.slow),
        pytest.param(RowlessCoxHead(), {WEIGHTS, DEVICES}, {"labels": times}, marks=pytest.mark.slow),
        pytest.param(MaskedMeanHead(), {DEVICES}, {}, marks=pytest.mark.slow),
        pytest.param(
            OverflowingHead(),
            {EXTREMES},
            {"labels": lambda rng, lead: rng.integers(0, 2, (*lead, 1))},
            marks=pytest.mark.slow,
        ),
        pytest.param(UnequalHead(), {"one trace, and eager equals jit"}, {}, marks=pytest.mark.slow),
        pytest.param(UnsignedHead(), {"losses below 0 are declared"}, {}, marks=pytest.mark.slow),
        pytest.param(OverflowingMeanHead(), {EXTREMES}, {}, marks=pytest.mark.slow),
        (MaskForgettingHead(), {ABSENCE, WEIGHTS}, {}),
        pytest.param(LenientHead(), {"bad input is refused or visible"}, {}, marks=pytest.mark.slow),
        pytest.param(
            HalfPrecisionHead(),
            {"the loss is the oracle's"},
            {"oracle": lambda labels, logits: (labels - logits) ** 2},
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda given: type(given).__name__ if isinstance(given, jh.Head) else "",
)
def test_a_broken_head_is_told_which_laws_it_breaks(head, broken, given):
    report = check_head(head, devices=jax.devices()[: 2 if DEVICES in broken else 0], raises=False, **given)
    assert broken <= {finding.law for finding in report.broken}


@pytest.mark.slow
def test_a_formula_that_is_infinite_at_the_fill_obeys_the_laws():
    check_head(ScaledLogHead(), devices=())


class CenteredHead(jh.Head):
    """A mean over rows, hidden ones too."""

    logits_dimension = 1
    coupling = "row"

    def losses(self, labels, logits):
        return (labels - logits + jnp.mean(logits)) ** 2


def test_a_broken_law_is_an_error_that_shows_the_smallest_input():
    with pytest.raises(AssertionError, match=rf"CenteredHead breaks \d of 14 laws(.|\n)*{ABSENCE} +BROKEN") as error:
        check_head(CenteredHead(), devices=())
    # Of two rows, one of them hidden.
    assert re.search(r"labels = array\(\[\[[^\[]*\[[^\[]*\]\]", str(error.value))
    assert "left out: there is one device" in str(error.value)


def test_what_is_no_broken_law_is_refused():
    with pytest.raises(ValueError, match="weight_column"):
        check_head(jh.BinaryClassHead("w"))
    with pytest.raises(ValueError, match="the class CoxHead"):
        check_head(CoxHead)  # pyright: ignore[reportArgumentType]  # what is tested
    sliced = jh.BinaryClassHead(slices=jh.Slices("origin", 2))
    with pytest.raises(ValueError, match="origin"):
        check_head(sliced)

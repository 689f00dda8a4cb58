"""Every head compiled for TPUs, two heads for five generations, on a machine without one: collectives and memory."""

import math

import jax
import pytest
from zoo import ENGINE, ZOO

import jaxheads as jh
from tpu_compile.programs import CHIPS, INPUTS, PROGRAMS, ROWS, analyzed, mapped_step, mesh_of

pytestmark = pytest.mark.tpu
# Of the global objectives one: they differ by numbers alone. (Pairs gather rows, and anchors multiply them: other
# bounds.)
OBJECTIVE = "precision_at_recall"
HEADS = [entry for entry in ZOO if entry.name == OBJECTIVE or not isinstance(entry.head, jh.GlobalObjectiveHead)]
# Large batches take a compiler five times as long: one generation compiles both.
BATCHES = [*((chip, 2**13, chip) for chip in CHIPS), ("v6e", ROWS, "v6e_large")]
# Every head is compiled for one generation, and two for all: one with a histogram, one with several heads. The heads of
# the engine are compiled for large batches too. A whole step, of which the head is a part, is compiled for the two.
ACROSS = ("binary", "multi_head")
LARGE = (*ENGINE, OBJECTIVE)


def placed(large):
    """Heads, generations and batches: with these heads in large ones."""
    return pytest.mark.parametrize(
        ("entry", "chip", "rows"),
        [
            pytest.param(entry, chip, rows, id=f"{entry.name}-{name}")
            for entry in HEADS
            for chip, rows, name in BATCHES
            if name == "v6e" or entry.name in (large if name == "v6e_large" else ACROSS)
        ],
    )


each = placed(LARGE)

# Bytes for each row and each logit of it on a device: what a program reads and writes, as XLA counts them, and its
# temporary memory. From 3 % (a train step) to a third above the most that was measured for large batches.
# A step of a head that learns copies live rows into masked ones: 60 more.
ACCESSED = {"loss_and_gradient": 200, "update_metrics": 540, "train_step": 260}
TEMPORARY = {"loss_and_gradient": 16, "update_metrics": 32, "train_step": 16}
# Of all-reduces, however few numbers they add up: small batches cannot hide it.
SCRATCH = {"accessed": 2**18, "temporary": 2**20}


def check(entry, chip, rows, program):
    found = analyzed(PROGRAMS[program](entry, chip, rows))
    others = {name: n for name, n in found.collectives.items() if n and name != "all-reduce"}
    assert not others
    assert found.scatters == 0  # a TPU is slow at them
    logits = rows * entry.head.logits_dimension
    # The inputs are read for the logits and for the gradient; XLA counts them six times.
    inputs = 6 * 4 * rows * INPUTS if program == "train_step" else 0
    scratch = SCRATCH if rows < ROWS else {"accessed": 0, "temporary": 0}
    assert found.accessed <= inputs + scratch["accessed"] + logits * ACCESSED[program]
    assert found.temp <= scratch["temporary"] + logits * TEMPORARY[program]
    return found


@each
def test_loss_and_gradient(entry, chip, rows):
    """Numerator and denominator cross the devices together; the gradient of a row stays where the row is."""
    assert len(check(entry, chip, rows, "loss_and_gradient").reduced) == 1


@each
def test_an_update_of_metrics_is_one_all_reduce(entry, chip, rows):
    found = check(entry, chip, rows, "update_metrics")
    slots = entry.head.metrics().state.shape[0]
    (elements,) = found.reduced
    assert elements <= 1.3 * slots + 64
    # Where there is a histogram, it is made by matrix products.
    assert (found.products > 0) == (slots > 100)


@placed(ACROSS)
def test_a_train_step_adds_gradients_up_once(entry, chip, rows):
    found = check(entry, chip, rows, "train_step")
    gradient = INPUTS * entry.head.logits_dimension
    learned = sum(math.prod(x.shape) for x in jax.tree.leaves(entry.params()))
    *before, last = sorted(found.reduced)
    # What comes before are the few sums that the loss is made of, by which gradients are divided.
    assert gradient <= last <= gradient + learned + 8
    assert sum(before) <= 8
    assert len(before) <= 1


@pytest.mark.parametrize(
    ("entry", "chip", "rows"),
    [
        pytest.param(entry, chip, rows, id=f"{entry.name}-{name}")
        for entry in ZOO
        for chip, rows, name in BATCHES
        if entry.name == "binary" or (entry.name == "ordinal" and chip == "v6e")
    ],
)
def test_a_mapped_step_is_as_sparing(entry, chip, rows):
    """Under `shard_map`, metrics included: the loss's sums, the gradients, the metrics, and nothing twice."""
    found = analyzed(mapped_step(entry, chip, rows))
    assert not any(n for name, n in found.collectives.items() if name != "all-reduce")
    assert 1 <= len(found.reduced) <= 3
    slots = entry.head.metrics().state.shape[0]
    learned = sum(math.prod(x.shape) for x in jax.tree.leaves(entry.params()))
    assert slots + INPUTS <= sum(found.reduced) <= 1.3 * slots + INPUTS + learned + 8


def test_the_chips_are_five_generations():
    kinds = {chip: mesh_of(chip).devices.flat[0].device_kind for chip in CHIPS}
    assert kinds == {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}
    assert all(mesh_of(chip).size >= 4 for chip in CHIPS)

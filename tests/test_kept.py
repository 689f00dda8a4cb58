"""Programs live as long as their head: a search over many heads does not grow, and nothing is compiled twice."""

import concurrent.futures
import copy
import dataclasses
import gc
import pickle
import weakref
from typing import Any

import jax
import numpy as np
import pytest

import jaxheads as jh
from jaxheads.numerics import kept

LABELS, Z = np.array([0.0, 1.0]), np.zeros((2, 1), np.float32)


class Loss:
    """A loss that counts how often it is traced."""

    def __init__(self):
        self.traced = 0

    def __call__(self, labels: Any, logits: Any) -> Any:
        self.traced += 1
        return (labels - logits) ** 2


def use(head: jh.Head) -> None:
    """All that keeps something for a head."""
    head.loss(LABELS, Z)
    (head.metrics() + head.measure(LABELS, Z)).compute(warn=False)
    jh.boosting.xgboost_objective(head)(LABELS, Z[:, 0])


def forget() -> None:
    """Makes other heads the last ones that were used."""
    for i in range(kept.RECENT):
        jh.RegressionHead(name=f"other {i}").metrics()
    gc.collect()


def test_what_a_head_held_is_freed_with_it():
    loss = Loss()
    gone = weakref.ref(loss)
    head = jh.RegressionHead(loss_fn=loss)
    use(head)
    programs = weakref.ref(vars(head)[kept.KEPT])
    del head, loss
    forget()
    assert gone() is None
    assert programs() is None


def run_step(head: jh.Head) -> jh.Metrics:
    return jax.jit(lambda metrics: metrics + head.measure(LABELS, Z))(head.metrics())


def test_programs_are_freed_though_jax_remembers_the_structure_of_metrics():
    head = jh.RegressionHead(name="remembered")
    use(head)
    metrics = run_step(head)
    programs = weakref.ref(vars(head)[kept.KEPT])
    del head
    forget()
    assert programs() is None
    assert metrics.compute()["average_loss/remembered"] == 0.5


def test_nothing_is_compiled_twice_for_equal_heads():
    loss = Loss()
    use(jh.RegressionHead(loss_fn=loss))
    traced = loss.traced
    # A head that is made anew for each call, as in notebooks.
    for _ in range(3):
        use(jh.RegressionHead(loss_fn=loss))
    assert loss.traced == traced
    # One that lives is never forgotten.
    head = jh.RegressionHead(loss_fn=loss)
    use(head)
    forget()
    use(head)
    use(jh.RegressionHead(loss_fn=loss))
    assert loss.traced == traced


def test_copies_and_pickles_leave_programs_behind():
    head = jh.MultiClassHead(3)
    head.loss(np.array([0, 1]), np.zeros((2, 3), np.float32))
    assert kept.KEPT in vars(head)
    for copied in (copy.copy(head), copy.deepcopy(head), pickle.loads(pickle.dumps(head)), dataclasses.replace(head)):
        assert kept.KEPT not in vars(copied)
        assert copied == head


def test_a_head_that_learns_is_kept_too():
    loss = Loss()
    head = jh.MultiHead([jh.RegressionHead(name="a", loss_fn=loss)], weighting="uncertainty")
    params = head.init(jax.random.key(0))
    head.loss({"a": LABELS}, Z, params=params)
    traced = loss.traced
    forget()
    head.loss({"a": LABELS}, Z, params=params)
    assert loss.traced == traced


@pytest.mark.parametrize("threads", [8])
def test_threads_share_what_is_kept(threads):
    def work(i: int) -> float:
        return float(jh.RegressionHead(name=f"{i % 2}").loss(LABELS, Z + i))

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(work, range(64)))
    np.testing.assert_allclose(found, [(i**2 + (i - 1) ** 2) / 2 for i in range(64)])


@pytest.mark.slow
def test_a_search_over_many_heads_does_not_grow():
    """At most 0.3 MB a head that is gone, where their programs alone take more than ten times as much."""
    from benchmarks.many_heads import grow

    first = grow(kept.RECENT + 8)[-1]
    assert grow(60, first=1000)[-1] - first < 0.3 * 60

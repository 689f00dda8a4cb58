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
    for store in (kept.per_head, kept.programs_per_head):
        for i in range(store.recent):
            store.find(jh.RegressionHead(name=f"other {i}"))
    gc.collect()


def programs_of(head: Any) -> Any:
    return weakref.ref(head._kept[kept.programs_per_head])


def test_what_a_head_held_is_freed_with_it():
    loss = Loss()
    gone = weakref.ref(loss)
    head = jh.RegressionHead(loss_fn=loss)
    use(head)
    programs = programs_of(head)
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
    programs = programs_of(head)
    del head
    forget()
    assert programs() is None
    assert metrics.compute()["average_loss/remembered"] == 0.5


@pytest.mark.parametrize("way", ["inside another", "unpickled", "merged", "boosted"])
def test_no_metrics_keep_programs_alive(way):
    head = jh.RegressionHead(name="held")
    use(head)
    programs, given = programs_of(head), head.measure(LABELS, Z)
    if way == "inside another":
        held: Any = jh.MultiHead([head]).metrics()
    elif way == "unpickled":
        held = pickle.loads(pickle.dumps(given))
        held.compute(warn=False)
    elif way == "merged":
        held = jh.Metrics.merge([], head=head), jh.Metrics.merge([given], head=head)
    else:
        from jaxheads.boosting.datasets import prepare
        from jaxheads.boosting.evaluation import measure_rows

        held = measure_rows(head, None, prepare(head, LABELS, None), Z)
    del head
    forget()
    assert programs() is None
    assert held is not None


def test_bound_heads_that_are_held_compile_once():
    loss = Loss()
    heads = [jh.MultiHead([jh.RegressionHead(name=f"h{i}", loss_fn=loss)], weighting="uncertainty") for i in range(2)]
    bound = [head.bind(head.init(jax.random.key(0))) for head in heads]
    del heads
    traced = 0
    for _ in range(2):
        for i, head in enumerate(bound):
            head.loss({f"h{i}": LABELS}, Z)
        traced = loss.traced
        forget()
    for i, head in enumerate(bound):
        head.loss({f"h{i}": LABELS}, Z)
    assert loss.traced == traced


def test_a_field_that_a_subclass_sets_late_counts():
    class Late(jh.RegressionHead):
        def __post_init__(self):
            super().__post_init__()
            object.__setattr__(self, "name", "late")

    assert "label/mean/late" in Late(extra_metrics=[jh.metrics.R2Score()]).measure(LABELS, Z).compute(warn=False)
    head = jh.RegressionHead()
    head.metrics()
    assert jh.RegressionHead(**{**vars(head), "name": "b"}).name == "b"


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
    assert programs_of(head)() is not None
    assert kept.KEPT not in vars(head)
    for copied in (copy.copy(head), copy.deepcopy(head), pickle.loads(pickle.dumps(head)), dataclasses.replace(head)):
        assert not hasattr(copied, kept.KEPT)
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

    first = grow(kept.programs_per_head.recent + 8)[-1]
    assert grow(60, first=1000)[-1] - first < 0.3 * 60

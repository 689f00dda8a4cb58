"""How groups of tests are dealt out to worker processes, and how programs are counted.

The workers here only note which tests they get.
"""

import collections
import types
from typing import Any

import jax
import numpy as np
import programs
import pytest


class Worker:
    """As a worker of xdist it holds a test back until it knows what comes next: another test, or the end."""

    shutting_down = False

    def __init__(self, name):
        self.gateway = types.SimpleNamespace(id=name)
        self.waiting, self.had = [], []

    @property
    def can_run(self):
        return len(self.waiting) >= (1 if self.shutting_down else 2)

    def send_runtest_some(self, indices):
        self.waiting += indices

    def shutdown(self):
        self.shutting_down = True


TESTS = [f"tests/test_{file}.py::test_{i}" for file in "abcdefgh" for i in range(4)]


def run(kept, speeds, dies_after=None):
    """What each worker ran, by its name; `kept` is what pytest's cache holds, None where there is no cache.

    `speeds` are how many tests each runs in a round. With `dies_after`, the first dies after so many tests, and another
    takes its place.
    """
    config: Any = types.SimpleNamespace(
        option=types.SimpleNamespace(dist="load", numprocesses=len(speeds), loadscopereorder=True),
        cache=None if kept is None else types.SimpleNamespace(get=kept.get, set=kept.__setitem__),
        getvalue=lambda name: ["popen"] * len(speeds),
    )
    scheduler = programs.scheduler(config, None)
    alive, dead = [], []

    def add(name):
        alive.append(Worker(name))
        scheduler.add_node(alive[-1])
        scheduler.add_node_collection(alive[-1], TESTS)

    for name in speeds:
        add(name)
    scheduler.schedule()
    while any(worker.can_run for worker in alive):
        for worker in list(alive):
            for _ in range(speeds.get(worker.gateway.id, 1)):
                if worker.can_run:
                    worker.had.append(worker.waiting.pop(0))
                    scheduler.mark_test_complete(worker, worker.had[-1])
            if dies_after is not None and len(worker.had) >= dies_after and not dead:
                dead.append(worker)
                alive.remove(worker)
                scheduler.remove_node(worker)
                add(f"gw{len(speeds)}")
                scheduler.schedule()
            if scheduler.tests_finished:  # as xdist's session does
                for other in alive:
                    other.shutdown()
    assert not any(worker.waiting for worker in alive)
    return {worker.gateway.id: [TESTS[i] for i in worker.had] for worker in (*alive, *dead)}


def test_groups_stay_together_and_nothing_is_lost():
    had = run({}, {"gw0": 1, "gw1": 1})
    assert sorted(had["gw0"] + had["gw1"]) == TESTS
    assert not {programs.group_of(test) for test in had["gw0"]} & {programs.group_of(test) for test in had["gw1"]}


def test_a_second_run_deals_groups_to_the_worker_that_had_them():
    kept = {}
    first = run(kept, {"gw0": 3, "gw1": 1})
    # Now the other worker is faster: it runs its own groups first, then takes from the end of the slower one's.
    second = run(kept, {"gw0": 1, "gw1": 6})
    assert sorted(second["gw0"] + second["gw1"]) == TESTS
    own = len(first["gw1"])
    assert second["gw1"][:own] == first["gw1"]
    assert second["gw1"][own : own + 4] == first["gw0"][-4:]
    # A group that was taken still belongs to the worker that had it first.
    assert run(kept, {"gw0": 3, "gw1": 1}) == first


@pytest.mark.parametrize("has_cache", [True, False])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("dies_after", [1, 5, 8, 11])
def test_a_worker_may_die(dies_after, workers, has_cache):
    kept, speeds = {} if has_cache else None, {f"gw{i}": 1 for i in range(workers)}
    had = run(kept, speeds, dies_after)
    ran = [test for tests in had.values() for test in tests]
    assert set(ran) == set(TESTS)
    # A group that was not finished may be run again from its beginning, and no other.
    again = {test for test in ran if ran.count(test) > 1}
    assert len({programs.group_of(test) for test in again}) <= 2
    if kept is not None:
        # The groups of a worker that the next run does not have go to those that it has.
        (dealt,) = kept.values()
        run(kept, speeds)
        assert set(dealt.values()) == set(speeds)


@pytest.mark.parametrize(("dist", "own"), [("load", True), ("loadgroup", True), ("worksteal", False), ("no", False)])
def test_another_way_to_deal_is_the_users_to_choose(dist, own):
    config: Any = types.SimpleNamespace(
        option=types.SimpleNamespace(dist=dist, numprocesses=2), cache=None, getvalue=lambda name: ["popen"] * 2
    )
    assert (programs.scheduler(config, None) is not None) == own


# The guard on growth

COUNTS = {
    ("quick", "test_laws.py", "new"): 31,
    ("quick", "test_laws.py", "binary"): 20,
    ("quick", "test_other.py", "test_other.py"): 5,
    ("slow", "test_laws.py", "new"): 90,
    ("tpu", "test_tpu_compile.py", "test_tpu_compile.py"): 900,
}
JUST_ENOUGH = {
    "all files": 56,
    "any other file": 5,
    "test_laws.py": 51,
    "a head in test_laws.py": 31,
    "a head of ENGINE in test_laws.py": 20,
}


@pytest.mark.parametrize(
    ("key", "number", "name"),
    [
        ("all files", 56, "all files together"),
        ("any other file", 5, "test_other.py"),
        ("test_laws.py", 51, "test_laws.py"),
        ("a head in test_laws.py", 31, "the head 'new' in test_laws.py"),
        ("a head of ENGINE in test_laws.py", 20, "the head 'binary' in test_laws.py"),
    ],
)
def test_a_budget_that_is_exceeded_is_named(key, number, name):
    slow = dict.fromkeys(JUST_ENOUGH, 90)
    assert not programs.beyond(COUNTS, {"quick": JUST_ENOUGH, "slow": slow})
    (message,) = programs.beyond(COUNTS, {"quick": {**JUST_ENOUGH, key: number - 1}, "slow": slow})
    assert message.startswith(
        f"The quick tests of {name} compiled {number} programs, more than the budget of {number - 1} "
        f'("{key}" under [quick] in tests/budgets.toml)'
    )


def test_a_run_fails_when_its_workers_exceed_a_budget_together(request, monkeypatch):
    conftest: Any = next(
        plugin for plugin in request.config.pluginmanager.get_plugins() if getattr(plugin, "programs", None) is programs
    )
    monkeypatch.setattr(programs, "BUDGETS", {"quick": JUST_ENOUGH, "slow": dict.fromkeys(JUST_ENOUGH, 180)})

    def finish(workers: int) -> pytest.ExitCode:
        monkeypatch.setattr(programs, "counts", collections.Counter(COUNTS))
        worker = types.SimpleNamespace(workeroutput={})
        conftest.pytest_sessionfinish(types.SimpleNamespace(config=worker))
        monkeypatch.setattr(programs, "counts", collections.Counter())
        for _ in range(workers):
            conftest.pytest_testnodedown(worker)
        session = types.SimpleNamespace(config=types.SimpleNamespace(), exitstatus=pytest.ExitCode.OK)
        conftest.pytest_sessionfinish(session)
        return session.exitstatus

    assert finish(1) == pytest.ExitCode.OK
    assert finish(2) == pytest.ExitCode.TESTS_FAILED


def test_a_program_counts_in_a_cache_or_not(monkeypatch):
    monkeypatch.setattr(programs, "counts", collections.Counter())
    item: Any = types.SimpleNamespace(nodeid="tests/test_here.py::test[poisson]", get_closest_marker=lambda name: None)
    x = np.ones(3, np.float32)
    for _ in range(2):
        jax.clear_caches()
        with programs.counted(item):
            jax.block_until_ready(jax.jit(lambda x: x * 3)(x))
    assert programs.counts == {("quick", "test_here.py", "test_here.py"): 2}

"""Compiled programs, which are nearly all that a test costs: how they are compiled, kept, dealt out, and counted.

* **Compiled** for speed of compiling: without most of LLVM's passes (but for tests marked `rounding`, which are about
  what XLA rounds, and `runs_long`), and by XLA's older emitters where jaxlib still has them.
  `JAXHEADS_TEST_XLA=default` leaves all as it is at a user's; CI runs the laws and the
  files with tests marked `rounding` once more so.
* **Kept** in pytest's cache of the checkout: a second run finds them there. `--cache-clear` begins anew.
* **Dealt out** to processes by head: two of them would compile the same programs twice.
* **Counted** by head in the laws, against `BUDGET`: a new head must not bring back the quarter of an hour.
"""

import collections
import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

import jax
import jaxlib
import pytest

# How many programs the laws of one head may compile: `test_laws*.py` and `test_lowering.py`, in one process.
# Measured alone: 13 to 28, and 49 to 119 for those of ENGINE. Slow heads go every way over devices in the same tests.
BUDGET = {"a head": 40, "a head of ENGINE": 130, "a slow head": 100, "a slow head of ENGINE": 300}

# Their tests compile by head, and share the programs of a head.
LAWS = ("test_laws.py", "test_laws_engine.py", "test_laws_devices.py", "test_lowering.py")

# With these flags jaxlib 0.10.1 compiles a program of the laws in a third of the time. A flag that jaxlib does not know
# ends the process.
FLAGS = "--xla_cpu_use_fusion_emitters=false --xla_cpu_copy_insertion_use_region_analysis=false"
FLAGS += " --xla_cpu_parallel_codegen_split_count=1"
AS_USERS = os.environ.get("JAXHEADS_TEST_XLA") == "default"

# Dealt out first, for they take longest: what is left for the end is small.
LONG = (
    "test_goldens.py",
    "test_boosting.py",
    "test_groups.py",
    "test_metrics_scores.py",
    "test_numerics.py",
    "doctests",
)
LONG += ("test_metrics_classes.py", "test_global_objectives.py", "test_group_constraints.py", "test_hosts.py")

# By group, slow tests apart: those of a head that is quick go further ways over devices.
counts: collections.Counter[tuple[str, bool]] = collections.Counter()
_compiled = 0


def _listen(event: str, duration_secs: float, **_: str | int) -> None:
    global _compiled
    _compiled += event == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(_listen)


def start(devices: int) -> None:
    """Starts JAX on so many CPU devices. The flags are for this process alone: others ask for `environment`."""
    jax.config.update("jax_num_cpu_devices", devices)
    given = os.environ.get("XLA_FLAGS")
    os.environ.update({key: value for key, value in environment().items() if key == "XLA_FLAGS"})
    try:
        jax.devices()
    finally:
        os.environ.pop("XLA_FLAGS", None)
        if given is not None:
            os.environ["XLA_FLAGS"] = given


def environment() -> dict[str, str]:
    """Variables that make another process of the tests compile fast."""
    if AS_USERS:
        return {}
    known = (
        {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"} if jaxlib.version.__version_info__ < (0, 11) else {}
    )
    return {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", **known}


def keep(config: pytest.Config) -> None:
    """Keeps compiled programs of any size in the cache of the checkout, if it has one that can be written."""
    if (cache := getattr(config, "cache", None)) is None:
        return
    try:
        folder = cache.mkdir("programs")
    except OSError:  # of a read-only checkout: each run compiles all
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # A run that was stopped may leave a file that is cut short. JAX compiles its program again in each run, until
    # `--cache-clear`.
    config.addinivalue_line("filterwarnings", "ignore:Error reading persistent compilation cache:UserWarning")
    config.addinivalue_line("filterwarnings", "ignore:Error writing persistent compilation cache:UserWarning")


@functools.cache
def _heads() -> frozenset[str]:
    from zoo import ZOO  # which makes arrays: after `start`

    return frozenset(entry.name for entry in ZOO)


def group_of(nodeid: str) -> str:
    """Whose programs a test compiles: those of a head, or of its file. All doctests of the package are one group."""
    path, _, test = nodeid.partition("::")
    file = path.rpartition("/")[2]
    given = test.partition("[")[2].removesuffix("]").split("-") if file in LAWS else []
    return next((part for part in given if part in _heads()), file if file.startswith("test_") else "doctests")


def in_groups(items: list[pytest.Item]) -> None:
    """Sorts tests by group: in a group by how they are compiled, the count of a head's programs behind its laws."""
    place = {group: i - len(LONG) for i, group in enumerate(LONG)}
    for i, item in enumerate(items):
        place.setdefault(group_of(item.nodeid), i)

    def key(item: pytest.Item) -> tuple[int, bool, bool]:
        return place[group_of(item.nodeid)], as_users(item), item.name.startswith("test_programs_are_within")

    items.sort(key=key)


@functools.lru_cache(maxsize=1)  # nothing to do, as long as nothing changes
def compile_as_users(whether: bool) -> None:
    """With all of XLA's passes or few; a function that is compiled already would stay as it is."""
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", not whether)


def as_users(item: pytest.Item) -> bool:
    """Whether a test is compiled with all of XLA's passes: it is about them, or runs for longer than it compiles."""
    return AS_USERS or any(item.get_closest_marker(name) for name in ("rounding", "runs_long", "tpu"))


def scheduler(config: pytest.Config, log: Any) -> Any:
    """Deals groups to processes, unless a `--dist` of the user's own says otherwise; to the same ones in every run.

    What JAX calls functions inside a program depends on what was traced before, and so does whether a kept program is
    found: dealt out otherwise, a tenth of the second run's programs were compiled again.
    `--dist loadgroup` is for this, but pytest-xdist 3.8 finds no groups under pytest 9.2.
    """
    if config.option.dist not in ("load", "loadgroup"):
        return None
    from xdist.scheduler import LoadScopeScheduling

    cache, where = getattr(config, "cache", None), f"programs/dealt to {config.option.numprocesses}"
    dealt: dict[str, str] = {} if cache is None else cache.get(where, {})

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

        def _assign_work_unit(self, node: Any) -> None:
            own = [group for group in self.workqueue if dealt.get(group, node.gateway.id) == node.gateway.id]
            # Who has done all of its own takes from the end of another's.
            group = own[0] if own else next(reversed(self.workqueue))
            self.workqueue.move_to_end(group, last=False)
            if group not in dealt and cache is not None:
                dealt[group] = node.gateway.id
                cache.set(where, dealt)
            super()._assign_work_unit(node)

    config.option.loadscopereorder = False  # in our own order, not by the number of tests
    return ByGroup(config, log)


@contextlib.contextmanager
def counted(item: pytest.Item) -> Iterator[None]:
    """Adds what a test compiles to the count of its group."""
    compile_as_users(as_users(item))
    before = _compiled
    yield
    counts[group_of(item.nodeid), item.get_closest_marker("slow") is not None] += _compiled - before


def beyond(name: str, number: int, budget: int) -> str:
    """What to say of a head that compiles too much; nothing of one that does not."""
    if number <= budget:
        return ""
    return (
        f"The laws of {name!r} compiled {number} programs, more than its budget of {budget} (tests/programs.py). Each "
        "takes a fifth of a second: share the program of `laws.step`, keep to its shapes and dtypes, and see "
        "tests/README.md."
    )

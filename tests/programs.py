"""How the tests compile programs, cache them, assign them to workers, and count them: nearly all that a test costs.

* **Compiled** for speed of compiling: without most of LLVM's passes, and by XLA's older emitters where jaxlib still has
  them. Tests marked `rounding` (they are about what XLA rounds) or `all_passes` keep all passes, but the same emitters.
  With `JAXHEADS_TEST_XLA=default` all tests keep JAX's default settings, as for a user. CI runs the quick laws and the
  tests marked `rounding` once more in this way.
* **Cached** in pytest's cache of the checkout, where a second run finds them. `--cache-clear` empties it.
* **Assigned** to workers (pytest-xdist processes) by head: two workers would compile the same programs twice.
* **Counted** by file, and in the laws by head, against `budgets.toml`: a new head must not bring back test runs of a
  quarter of an hour.
"""

import collections
import contextlib
import functools
import os
import pathlib
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jaxlib
import pytest

# How many programs a run may compile: the only place where budgets are written.
BUDGETS = tomllib.loads(pathlib.Path(__file__).with_name("budgets.toml").read_text())

# In these files the tests of one head share its programs.
LAWS = ("test_laws.py", "test_laws_engine.py", "test_laws_devices.py", "test_lowering.py")

# With these flags jaxlib 0.10.1 compiles a program of the laws in a third of the time. A flag that jaxlib does not know
# ends the process.
FLAGS = "--xla_cpu_use_fusion_emitters=false --xla_cpu_copy_insertion_use_region_analysis=false"
FLAGS += " --xla_cpu_parallel_codegen_split_count=1"
AS_USERS = os.environ.get("JAXHEADS_TEST_XLA") == "default"

# These groups start first because they take longest: only short groups are left for the end.
LONG = (
    "test_goldens.py",
    "test_boosting.py",
    "test_groups.py",
    "test_metrics_scores.py",
    "test_numerics.py",
    "doctests",
)
LONG += ("test_metrics_classes.py", "test_global_objectives.py", "test_group_constraints.py", "test_hosts.py")

# Programs by kind of test (a table of `budgets.toml`), file, and group: a head, or the file again.
counts: collections.Counter[tuple[str, str, str]] = collections.Counter()
_compiled = 0

# The folder of kept programs, and the settings that make JAX keep programs of any size.
_folder: str | None = None
KEPT = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}


def _listen(event: str, duration_secs: float, **_: str | int) -> None:
    global _compiled
    _compiled += event == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(_listen)


def start(devices: int) -> None:
    """Starts JAX on this number of CPU devices. The flags are for this process alone: others use `environment`."""
    jax.config.update("jax_num_cpu_devices", devices)
    given = os.environ.get("XLA_FLAGS")
    os.environ.update({key: value for key, value in environment().items() if key == "XLA_FLAGS"})
    try:
        jax.devices()
    finally:
        os.environ.pop("XLA_FLAGS", None)
        if given is not None:
            os.environ["XLA_FLAGS"] = given


def environment(all_passes: bool = False) -> dict[str, str]:
    """Environment variables that make another process of the tests compile fast, and share the cache of programs."""
    kept = {} if _folder is None else {"JAX_COMPILATION_CACHE_DIR": _folder, **KEPT}
    if AS_USERS or all_passes:
        return kept
    known = (
        {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"} if jaxlib.version.__version_info__ < (0, 11) else {}
    )
    return {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", **known, **kept}


def keep(config: pytest.Config) -> None:
    """Stores compiled programs of any size in pytest's cache of the checkout, if that can be written."""
    if (cache := getattr(config, "cache", None)) is None:
        return
    global _folder
    try:
        _folder = str(cache.mkdir("programs"))
    except OSError:  # the checkout is read-only: each run compiles everything
        return
    jax.config.update("jax_compilation_cache_dir", _folder)
    for name, value in KEPT.items():
        jax.config.update(name.lower(), int(value))
    # A run that was stopped may leave a truncated file. JAX then compiles that program again in each run, until
    # `--cache-clear`.
    config.addinivalue_line("filterwarnings", "ignore:Error reading persistent compilation cache:UserWarning")
    config.addinivalue_line("filterwarnings", "ignore:Error writing persistent compilation cache:UserWarning")


@functools.cache
def _heads() -> frozenset[str]:
    from zoo import ZOO  # imported late: it makes arrays, which must come after `start`

    return frozenset(entry.name for entry in ZOO)


@functools.cache
def _engine() -> frozenset[str]:
    from zoo import ENGINE

    return frozenset(ENGINE)


def file_of(nodeid: str) -> str:
    """The name of a test's file; "doctests" for all doctests of the package."""
    file = nodeid.partition("::")[0].rpartition("/")[2]
    return file if file.startswith("test_") else "doctests"


def group_of(nodeid: str) -> str:
    """The group of a test, which shares programs: a head, or a file."""
    file = file_of(nodeid)
    given = nodeid.partition("::")[2].partition("[")[2].removesuffix("]").split("-") if file in LAWS else []
    return next((part for part in given if part in _heads()), file)


def in_groups(items: list[pytest.Item]) -> None:
    """Sorts tests by group, then by how they are compiled."""
    place = {group: i - len(LONG) for i, group in enumerate(LONG)}
    for i, item in enumerate(items):
        place.setdefault(group_of(item.nodeid), i)

    def key(item: pytest.Item) -> tuple[int, bool]:
        return place[group_of(item.nodeid)], needs_all_passes(item)

    items.sort(key=key)


@functools.lru_cache(maxsize=1)  # does nothing while the value stays the same
def use_all_passes(whether: bool) -> None:
    """Switches between all of XLA's passes and few. Clears the caches: compiled functions would not change."""
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", not whether)


def needs_all_passes(item: pytest.Item) -> bool:
    """Whether a test is compiled with all of XLA's passes: it tests rounding, or runs for longer than it compiles."""
    return AS_USERS or any(item.get_closest_marker(name) for name in ("rounding", "all_passes", "tpu"))


def scheduler(config: pytest.Config, log: Any) -> Any:
    """Assigns each group to one worker, in every run to the same if it can, unless the user gives another `--dist`.

    The names that JAX gives to functions inside a program depend on what was traced before, and the cache finds a
    program by these names. When groups went to other workers, a tenth of the second run's programs were compiled again.
    `--dist loadgroup` is made for this, but pytest-xdist 3.8 finds no groups under pytest 9.2.
    """
    if config.option.dist not in ("load", "loadgroup"):
        return None
    from xdist.scheduler import LoadScopeScheduling

    cache, where = getattr(config, "cache", None), f"programs/dealt to {config.option.numprocesses}"
    dealt: dict[str, str] = {} if cache is None else cache.get(where, {})

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

        def remove_node(self, node: Any) -> Any:
            # Of a worker that has died, the groups that are done stay done. Run again, they would be empty, and the
            # worker that got one would wait for tests for ever (pytest-dev/pytest-xdist#1378).
            work = self.assigned_work[node]
            self.assigned_work[node] = {group: tests for group, tests in work.items() if not all(tests.values())}
            return super().remove_node(node)

        def _assign_work_unit(self, node: Any) -> None:
            own = [group for group in self.workqueue if dealt.get(group, node.gateway.id) == node.gateway.id]
            # A worker that has run all of its own groups takes the last one that is left.
            group = own[0] if own else next(reversed(self.workqueue))
            self.workqueue.move_to_end(group, last=False)
            if dealt.get(group) not in {worker.gateway.id for worker in self.nodes} and cache is not None:
                dealt[group] = node.gateway.id
                cache.set(where, dealt)
            super()._assign_work_unit(node)

    config.option.loadscopereorder = False  # keeps our own order, does not sort by the number of tests
    return ByGroup(config, log)


@contextlib.contextmanager
def counted(item: pytest.Item) -> Iterator[None]:
    """Adds the programs that a test compiles to `counts`. A program that the cache holds counts like any other."""
    use_all_passes(needs_all_passes(item))
    before = _compiled
    yield
    kind = next((name for name in ("slow", "tpu") if item.get_closest_marker(name)), "quick")
    counts[kind, file_of(item.nodeid), group_of(item.nodeid)] += _compiled - before


def beyond(counts: Mapping[tuple[str, str, str], int], budgets: Mapping[str, Mapping[str, int]]) -> list[str]:
    """A message for each budget that is exceeded: of all files, of a file, of a head in a file of laws."""
    sums: collections.Counter[tuple[str, str, str]] = collections.Counter()
    for (kind, file, group), number in counts.items():
        if kind in budgets:
            sums[kind, "all files together", "all files"] += number
            sums[kind, file, file if file in budgets[kind] else "any other file"] += number
            if group != file:
                head = "a head of ENGINE" if group in _engine() else "a head"
                sums[kind, f"the head {group!r} in {file}", f"{head} in {file}"] += number
    return [
        f"The {kind} tests of {name} compiled {number} programs, more than the budget of {budgets[kind][key]} "
        f'("{key}" under [{kind}] in tests/budgets.toml). Each takes a fifth of a second: see tests/README.md, "How to '
        'write a test that compiles little".'
        for (kind, name, key), number in sums.items()
        if number > budgets[kind][key]
    ]

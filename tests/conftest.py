"""The tests run with the strictest JAX settings, on eight CPU devices. `tests/README.md` says what a test costs."""

import gc

import chex
import jax
import programs
import pytest

programs.start(devices=8)
# Tracing makes many objects that stay alive. To scan them all again and again took a tenth of the time.
gc.set_threshold(50_000, 20, 50)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    programs.keep(config)


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist, nothing calls it
def pytest_xdist_make_scheduler(config, log):
    return programs.scheduler(config, log)


def pytest_collection_modifyitems(items):
    programs.in_groups(items)
    for item in items:
        # Batches of tests are small, often in few bins, or stacked. Doctests must show no warning that users would see.
        if not isinstance(item, pytest.DoctestItem):
            for name in ("GridWarning", "MaskWarning", "StackedWarning"):
                item.add_marker(pytest.mark.filterwarnings(f"ignore::jaxheads.{name}"), append=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    with programs.counted(item):
        return (yield)


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist, nothing calls it
def pytest_testnodedown(node):
    programs.counts.update(getattr(node, "workeroutput", {}).get("programs", {}))


def pytest_sessionfinish(session):
    """A worker sends its counts of programs. The main process has all of them: too many make the run fail."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["programs"] = dict(programs.counts)
    elif session.exitstatus == pytest.ExitCode.OK and programs.beyond(programs.counts, programs.BUDGETS):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(autouse=True)
def _count_traces_anew():
    """`chex.assert_max_traces` counts by the place of a function, which is the same for all parameters of a test."""
    chex.clear_trace_counter()


def pytest_terminal_summary(terminalreporter):
    """Prints how many golden cases passed, the table of law 5, and who compiled too many programs, if there are any."""
    import devices
    from goldens import loader

    passed = [report.nodeid for report in terminalreporter.stats.get("passed", []) if report.when == "call"]
    if line := loader.golden_summary(passed):
        terminalreporter.write_line(line)
    for line in devices.law_summary(passed):
        terminalreporter.write_line(line)
    for line in programs.beyond(programs.counts, programs.BUDGETS):
        terminalreporter.write_line(line, red=True)

"""The strictest JAX there is, on eight CPU devices."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def _clear_caches():
    """Compiled programs of one file are of no use to the next, and they add up."""
    yield
    jax.clear_caches()


def pytest_terminal_summary(terminalreporter):
    """How many golden cases passed, and the law of devices, at the end of every run that holds any."""
    import devices
    from goldens import loader

    passed = [report.nodeid for report in terminalreporter.stats.get("passed", []) if report.when == "call"]
    if line := loader.golden_summary(passed):
        terminalreporter.write_line(line)
    for line in devices.law_summary(passed):
        terminalreporter.write_line(line)

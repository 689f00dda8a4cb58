"""The installed package: what its import costs, what it exports and ships."""

import importlib.metadata
import importlib.resources
import json
import subprocess
import sys

import pytest

import jaxheads as jh

# In a fresh interpreter: here, pytest and the other tests have imported everything already.
PROBE = """
import json, sys
import jax
before = set(sys.modules)
{statement}
print(json.dumps(sorted(set(sys.modules) - before)))
"""
AT_MOST = 40
LATER = ("flax", "optax", "chex", "matplotlib", "sklearn", "pandas", "scipy.stats", "tqdm")


def modules_after(statement: str) -> list[str]:
    """What a statement imports beside `import jax`."""
    command = [sys.executable, "-c", PROBE.format(statement=statement)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def dear(modules: list[str]) -> list[str]:
    """The modules among them that `import jaxheads` must not pay for."""
    return [name for name in modules if any(name == later or name.startswith(f"{later}.") for later in LATER)]


def test_import_is_cheap():
    modules = modules_after("import jaxheads")
    print(f"import jaxheads: {len(modules)} modules over import jax")
    assert "jaxheads.head" in modules
    assert dear(modules) == []
    assert len(modules) <= AT_MOST
    assert not any(name.startswith("jaxheads.compose") for name in modules)


def test_dear_imports_are_found():
    assert dear(modules_after("import optax"))


def test_heads_are_built_without_optax():
    # optax comes with the first loss, not with the configuration.
    assert dear(modules_after("import jaxheads as jh; jh.BinaryClassHead(); jh.MultiClassHead(3)")) == []


def test_lazy_names_are_offered_and_found():
    assert "binary_or_multi_class_head" in dir(jh)
    assert modules_after("from jaxheads import binary_or_multi_class_head")
    assert jh.binary_or_multi_class_head(2) == jh.BinaryClassHead()
    with pytest.raises(AttributeError, match="no attribute 'BinaryHead'"):
        jh.BinaryHead  # noqa: B018  # the access is the test


def test_all_names_are_reachable():
    for name in dir(jh):
        getattr(jh, name)


def test_types_are_shipped():
    assert importlib.resources.files("jaxheads").joinpath("py.typed").is_file()


def test_version_is_that_of_the_installed_package():
    assert importlib.metadata.version("jaxheads") == jh.__version__

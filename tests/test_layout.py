"""The shape of the project: floors, docstrings, the zoo, the top level. Each check is also shown to fail."""

import abc
import ast
import dataclasses
import importlib
import inspect
import pathlib
import pkgutil
import subprocess
import types
from collections.abc import Iterable, Iterator

import pytest
from zoo import ZOO

import jaxheads as jh
from jaxheads import heads

REPOSITORY = pathlib.Path(__file__).parents[1]

FLOORS = (
    ("numerics",),
    ("losses", "metrics", "spec"),
    ("contract",),
    ("engine",),
    ("head",),
    ("heads",),
    ("compose", "boosting"),
    ("training", "export", "nn", "testing", "plots"),
    ("__init__",),
)
FLOOR = {unit: floor for floor, units in enumerate(FLOORS) for unit in units}
# What several heads share, in files of their own.
SHARED = ("class_options", "constants", "label_statistics", "loss_functions", "scoring")

TOP_LEVEL = {"pyproject.toml", "README.md", "BUILD_NOTES.md", "jaxheads", "tests", "examples"}
TOP_LEVEL |= {"LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "docs", "findings"}

DOCSTRING_PARTS = ("**Domain**", "**Link**", "**loss**", "**Predictions**", "**Metrics**")
DOCSTRING_PARTS += ("\nRaises:\n", "ValueError:", "\nSource:", ">>> ")


@dataclasses.dataclass(frozen=True)
class Import:
    """One import of the package's own: file and module it stands in, line, and the module it reaches."""

    path: pathlib.Path
    line: int
    source: str
    target: str


def module_name(path: pathlib.Path, package: pathlib.Path) -> str:
    parts = (package.name, *path.relative_to(package).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: pathlib.Path, package: pathlib.Path, modules: Iterable[str]) -> Iterator[Import]:
    """Every import of the package's own modules in a file, those inside functions and under `TYPE_CHECKING` too.

    `from package.a import b` reaches the module `package.a.b` if there is one, else `package.a`.
    """
    source = module_name(path, package)
    folder = source if path.name == "__init__.py" else source.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = folder.split(".")[: len(folder.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [node.module])])
            inner = [f"{base}.{alias.name}" for alias in node.names]
            targets = [target if target in modules else base for target in inner]
        else:
            continue
        for target in targets:
            if target.split(".")[0] == package.name:
                yield Import(path, node.lineno, source, target)


def hidden_imports(path: pathlib.Path) -> Iterator[int]:
    """Lines that import by a computed name, past the eyes of this test."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
            "import_module",
            "__import__",
        ):
            yield node.lineno


def unit_of(module: str) -> str:
    """The folder or file directly below the package; the package's own `__init__` by that name."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def complaint(found: Import) -> str | None:
    """Why an import is not allowed, or None."""
    source, target = unit_of(found.source), unit_of(found.target)
    for unit, module in ((source, found.source), (target, found.target)):
        if unit not in FLOOR:
            return f"{module} has no floor: add it to FLOORS"
    if FLOOR[target] < FLOOR[source]:
        return None
    if FLOOR[target] > FLOOR[source]:
        return f"upward, from floor {FLOOR[source]} to floor {FLOOR[target]}"
    if source != target:
        return f"sideways, on floor {FLOOR[source]}"
    shared = [f"jaxheads.heads.{name}" for name in SHARED]
    if source == "heads" and found.source != "jaxheads.heads" and found.target not in shared:
        return f"sideways: heads share through heads/{SHARED} alone"
    return None


def cycles(edges: Iterable[tuple[str, str]]) -> list[list[str]]:
    """The modules that import themselves by way of others: one path for each."""
    graph: dict[str, set[str]] = {}
    for source, target in edges:
        graph.setdefault(source, set()).add(target)

    def path(start: str) -> list[str] | None:
        reached, waiting = set(), [[start]]
        while waiting:
            here = waiting.pop()
            for target in sorted(graph.get(here[-1], ())):
                if target == start:
                    return [*here, target]
                if target not in reached:
                    reached.add(target)
                    waiting.append([*here, target])
        return None

    return [found for start in sorted(graph) if (found := path(start))]


def layout_faults(package: pathlib.Path) -> list[str]:
    """What is wrong with the imports inside a package, one line a fault."""
    files = sorted(package.rglob("*.py"))
    modules = {module_name(path, package) for path in files}
    found = [item for path in files for item in imports_of(path, package, modules)]
    faults = [
        f"{item.path.relative_to(package.parent)}:{item.line} imports {item.target}: {reason}"
        for item in found
        if (reason := complaint(item))
    ]
    faults += [
        f"{path.relative_to(package.parent)}:{line} imports by a computed name, which hides it from this test"
        for path in files
        if path not in (package / "__init__.py", package / "metrics" / "__init__.py")  # lazy; TYPE_CHECKING names all
        for line in hidden_imports(path)
    ]
    # What lies on one floor is a matter of order; across floors the rules above leave no cycle.
    edges = [(item.source, item.target) for item in found]
    return faults + [f"a cycle: {' -> '.join(cycle)}" for cycle in cycles(edges)]


def concrete_heads(module: types.ModuleType) -> dict[str, type[jh.Head]]:
    """The heads that a module exports."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, jh.Head) and not inspect.isabstract(value)
    }


def lacks_docstring(name: str, value: object) -> bool:
    """A dataclass or named tuple without one is given its signature in place of words."""
    text = value.__doc__
    return not text or text.startswith(f"{name}(")


def public_names(module: types.ModuleType) -> dict[str, object]:
    """What a package offers: neither its folders nor what it has imported from elsewhere."""
    values = {name: getattr(module, name) for name in dir(module) if not name.startswith("_")}
    return {
        name: value
        for name, value in values.items()
        if getattr(value, "__module__", "").split(".")[0] == module.__name__ and not isinstance(value, types.ModuleType)
    }


def missing_parts(docstring: str) -> list[str]:
    """The parts of a head's docstring that are not there."""
    text = inspect.cleandoc(docstring)
    return [part.strip() for part in DOCSTRING_PARTS if part not in text]


def subclassed(classes: Iterable[type[jh.Head]]) -> list[str]:
    """Concrete heads that another head inherits from, and abstract ones that do not say so in their names."""
    faults = []
    for cls in classes:
        for base in cls.__mro__[1:]:
            if issubclass(base, jh.Head) and base is not jh.Head:
                if not inspect.isabstract(base):
                    faults.append(f"{cls.__name__} inherits from the concrete {base.__name__}")
                elif not base.__name__.startswith("Abstract"):
                    faults.append(f"{base.__name__} is abstract, and its name should begin so")
    return faults


def library_heads() -> list[type[jh.Head]]:
    """All subclasses of `Head` in the library, exported or not."""
    for module in pkgutil.walk_packages(jh.__path__, "jaxheads."):
        importlib.import_module(module.name)
    found, waiting = [], [jh.Head]
    while waiting:
        below = waiting.pop().__subclasses__()
        found += [cls for cls in below if cls.__module__.startswith("jaxheads.")]
        waiting += below
    return found


def test_imports_go_down():
    assert layout_faults(REPOSITORY / "jaxheads") == []


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            {"numerics/a.py": "import jaxheads.losses.b"},
            ["numerics/a.py:1", "jaxheads.losses.b", "upward"],
        ),
        (
            {"numerics/a.py": "def f():\n    from jaxheads import head"},
            ["numerics/a.py:2", "jaxheads.head", "upward"],
        ),
        (
            {"head.py": "from jaxheads.heads.b import B"},
            ["head.py:1", "jaxheads.heads.b", "upward"],
        ),
        ({"head.py": "from jaxheads import Head"}, ["head.py:1", "imports jaxheads:", "upward"]),
        ({"metrics/a.py": "from .. import head"}, ["metrics/a.py:1", "jaxheads.head", "upward"]),
        ({"losses/__init__.py": "from ..metrics.b import c"}, ["jaxheads.metrics.b", "sideways"]),
        ({"metrics/a.py": "from jaxheads import losses"}, ["jaxheads.losses", "sideways"]),
        ({"nn/a.py": "from jaxheads.training.b import c"}, ["jaxheads.training.b", "sideways"]),
        ({"boosting/a.py": "from jaxheads.compose.b import c"}, ["jaxheads.compose.b", "sideways"]),
        ({"heads/a.py": "from jaxheads.heads import b"}, ["jaxheads.heads.b", "loss_functions"]),
        ({"heads/a.py": "from jaxheads.heads import B"}, ["imports jaxheads.heads:", "loss_functions"]),
        ({"engine/a.py": "from jaxheads.head import Head"}, ["jaxheads.head", "upward"]),
        ({"contract.py": "from jaxheads.engine import b"}, ["jaxheads.engine.b", "upward"]),
        (
            {"heads/a.py": "if TYPE_CHECKING:\n    import jaxheads.compose"},
            ["a.py:2", "jaxheads.compose", "upward"],
        ),
        ({"attic/a.py": "from jaxheads.numerics import b"}, ["jaxheads.attic.a", "no floor"]),
        (
            {"heads/a.py": "importlib.import_module('jax' + 'heads')"},
            ["heads/a.py:1", "computed name"],
        ),
        (
            {
                "numerics/a.py": "from jaxheads.numerics import b",
                "numerics/b.py": "from jaxheads.numerics.a import x",
            },
            ["a cycle: jaxheads.numerics.a -> jaxheads.numerics.b -> jaxheads.numerics.a"],
        ),
        (
            {
                "metrics/a.py": "from jaxheads.metrics import A",
                "metrics/__init__.py": "from .a import A",
            },
            ["a cycle"],
        ),
    ],
)
def test_wrong_imports_are_found(tmp_path, files, words):
    assert any(all(word in fault for word in words) for fault in layout_faults(_package(tmp_path, files)))


def test_right_imports_are_not_complained_of(tmp_path):
    files = {
        "numerics/a.py": "import jax\nfrom jaxheads.numerics import b",
        "metrics/a.py": "from jaxheads.metrics.b import B\nfrom jaxheads.numerics.a import c",
        "metrics/__init__.py": "from jaxheads.metrics.a import A",
        "head.py": "def f():\n    from jaxheads import spec\n    from jaxheads.metrics import A",
        "heads/__init__.py": "from jaxheads.heads.a import A",
        "heads/a.py": "from jaxheads import losses\nfrom jaxheads.heads import scoring\nfrom .. import metrics",
        "training/a.py": "from ..compose import factories",
        "__init__.py": "import importlib\nfrom jaxheads.head import Head\nimportlib.import_module(name)",
    }
    assert layout_faults(_package(tmp_path, files)) == []


def _package(folder: pathlib.Path, files: dict[str, str]) -> pathlib.Path:
    """A package with the units of the library, and in each a file `b.py` to import."""
    package = folder / "jaxheads"
    empty = ["__init__.py", "contract.py", "head.py", "spec.py", "heads/scoring.py", "compose/factories.py"]
    for unit in ("numerics", "losses", "metrics", "engine", "heads", "compose", "boosting", "training", "nn"):
        empty += [f"{unit}/__init__.py", f"{unit}/b.py"]
    for name, text in {**dict.fromkeys(empty, ""), **files}.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return package


@pytest.mark.parametrize("name", sorted(public_names(jh)))
def test_public_names_are_documented(name):
    value = getattr(jh, name)
    assert not lacks_docstring(name, value)
    for key, member in vars(value).items() if isinstance(value, type) else ():
        if not key.startswith("_") and (callable(member) or isinstance(member, property)):
            assert inspect.getdoc(getattr(value, key)), f"{name}.{key} has no docstring"


def test_missing_docstrings_are_found():
    @dataclasses.dataclass
    class Silent:
        x: int

    assert lacks_docstring("Silent", Silent)
    assert lacks_docstring("f", lambda: None)
    assert not lacks_docstring("Mean", jh.Mean)
    assert {"Head", "Metrics", "learned", "binary_or_multi_class_head"} <= set(public_names(jh))
    assert not {"heads", "importlib", "Any"} & set(public_names(jh))


@pytest.mark.parametrize("name", sorted(concrete_heads(heads)))
def test_heads_have_every_part_of_the_docstring(name):
    assert missing_parts(getattr(heads, name).__doc__) == []


@pytest.mark.parametrize("part", DOCSTRING_PARTS)
def test_missing_parts_are_found(part):
    whole = inspect.getdoc(jh.RegressionHead)
    assert whole is not None
    assert missing_parts(whole.replace(part, "")) == [part.strip()]


def test_concrete_heads_are_never_subclassed():
    found = library_heads()
    assert set(concrete_heads(heads).values()) <= set(found)
    assert subclassed(found) == []


def test_subclassed_heads_are_found():
    class HalfHead(jh.Head):
        @abc.abstractmethod
        def half(self): ...

    class WholeHead(HalfHead):
        logits_dimension = 1

        def half(self): ...

        def losses(self, labels, logits):
            return logits

    class LaterHead(jh.RegressionHead): ...

    assert "is abstract" in subclassed([WholeHead])[0]
    assert "concrete RegressionHead" in subclassed([LaterHead])[0]


def test_every_exported_head_is_public_and_in_the_zoo():
    exported = concrete_heads(heads)
    assert exported.keys() <= set(dir(jh))
    assert not_in_zoo(exported.values()) == []


def test_heads_outside_the_zoo_are_found():
    class NewHead(jh.Head):
        logits_dimension = 1

        def losses(self, labels, logits):
            return logits

    assert not_in_zoo([NewHead, jh.RegressionHead]) == ["NewHead"]


def not_in_zoo(classes: Iterable[type[jh.Head]]) -> list[str]:
    """Heads that no law is tested on."""
    return sorted({cls.__name__ for cls in classes} - {type(entry.head).__name__ for entry in ZOO})


def strangers(files: Iterable[str]) -> list[str]:
    """Top-level entries of a listing that do not belong there."""
    top = {file.split("/")[0] for file in files}
    return sorted(entry for entry in top - TOP_LEVEL if not entry.startswith("."))


def test_top_level_holds_only_what_belongs_there():
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout, so there is no list of its files")
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert strangers(listed.splitlines()) == []


def test_strangers_at_the_top_level_are_found():
    listed = ["README.md", ".ci/run", "jaxheads/head.py", "setup.py", "scripts/x.py"]
    assert strangers(listed) == ["scripts", "setup.py"]

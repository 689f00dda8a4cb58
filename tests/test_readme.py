"""What the README says that its doctests do not show: commands, counts, tables."""

import importlib.metadata
import inspect
import pathlib
import re

import pytest
from goldens import loader

from jaxheads import heads

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def command(name: str, text: str = README) -> str:
    """The one line in the fenced block that follows `<!-- NAME command -->`, as `.ci/run` finds it."""
    found = re.findall(rf"^<!-- {name} command -->\n```sh\n(.+)\n```$", text, re.MULTILINE)
    assert len(found) == 1, f"the README needs one {name} command, of one line. Found {found}."
    return found[0]


def wrong_counts(text: str) -> list[str]:
    """The golden cases that the README speaks of against those that are there."""
    required = sum(case.required for case in loader.all_cases())
    differ = len(loader.all_cases()) - required
    return [wanted for wanted in (f"{required} golden cases", f"{differ} differ on purpose") if wanted not in text]


def blocks(text: str) -> list[str]:
    """The Python examples, as code."""
    return [
        "\n".join(line[4:] for line in block.splitlines() if line.startswith((">>> ", "... ", "...")))
        for block in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


@pytest.mark.parametrize("name", ["main", "test"])
def test_commands_name_what_is_there(name):
    line = command(name)
    (extra,) = re.findall(r"pip install -e '\.\[(\w+)\]'", line)
    assert extra in (importlib.metadata.metadata("jaxheads").get_all("Provides-Extra") or [])
    for path in re.findall(r"\S+\.py", line):
        assert (ROOT / path).is_file()


def test_missing_commands_are_found():
    with pytest.raises(AssertionError, match="needs one test command"):
        command("test", README.replace("<!-- test command -->", ""))


def test_golden_cases_are_counted_rightly():
    assert wrong_counts(README) == []


def test_wrong_counts_are_found():
    assert len(wrong_counts(re.sub(r"\d+ (golden cases|differ on purpose)", r"0 \1", README))) == 2


def rows_of_heads(text: str) -> dict[str, str]:
    """The heads of the table under `## Heads`, each with the first argument that it shows."""
    (section,) = re.findall(r"^## Heads\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    return dict(re.findall(r"^\| `(\w+)\((\w*).*?\)` \|", section, re.MULTILINE))


def test_every_head_has_a_row():
    rows = rows_of_heads(README)
    assert rows.keys() == {name for name in vars(heads) if name.endswith("Head")}
    for name, argument in rows.items():
        assert not argument or argument in inspect.signature(getattr(heads, name)).parameters


def test_missing_rows_are_found():
    assert "BinaryClassHead" not in rows_of_heads(README.replace("| `BinaryClassHead()` |", "| a head |"))


def test_a_new_head_takes_at_most_fifteen_lines():
    block = next(block for block in blocks(README) if "(jh.Head):" in block and "jh.Mean" in block)
    definition = block[: block.index("\nhead = ")]
    assert "observe" in definition
    assert len([line for line in definition.splitlines() if line.strip()]) <= 15


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target

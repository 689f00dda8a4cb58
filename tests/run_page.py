"""Runs the Python blocks of a page one after the other, in one namespace: `run_page.py PAGE [HEADING ...]`.

With headings, only the blocks before the first heading and those under the named ones run.
"""

import pathlib
import sys
import time
from collections.abc import Iterator


def read_blocks(text: str) -> Iterator[tuple[str, int, str]]:
    """Gives the heading, the first line and the code of each block."""
    heading, code, start = "", None, 0
    for number, line in enumerate(text.splitlines(), 1):
        if code is not None and line.startswith("```"):
            yield heading, start, "\n".join(code)
            code = None
        elif code is not None:
            code.append(line)
        elif line.startswith("```python"):
            code, start = [], number
        elif line.startswith("## "):
            heading = line.removeprefix("## ")


def main(page: pathlib.Path, headings: list[str]) -> None:
    """Runs the blocks, and prints the seconds of each."""
    names: dict[str, object] = {"__name__": "__main__"}
    blocks = list(read_blocks(page.read_text(encoding="utf-8")))
    if unknown := set(headings) - {heading for heading, _, _ in blocks}:
        raise SystemExit(f"{page} has no blocks under {sorted(unknown)}")
    for heading, start, code in blocks:
        if heading and headings and heading not in headings:
            continue
        begun = time.monotonic()
        # The lines of a traceback are those of the page.
        exec(compile("\n" * start + code, str(page), "exec"), names)
        print(f"{heading or 'the first block'}, line {start}: {time.monotonic() - begun:.1f} s", flush=True)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2:])

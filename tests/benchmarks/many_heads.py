"""Memory over a search: `python tests/benchmarks/many_heads.py [--heads 1000] [--calls 10000]`.

Each head is another one (another threshold), is used for a loss, an update and a read of its metrics, and is dropped.
The table gives the memory of the process after every tenth of them, and at the end MB for each head and KB for each
call of one head.
"""

import argparse
import gc
import os
import time

import jax
import numpy as np

import jaxheads as jh

LABELS, LOGITS = np.array([0, 1, 1, 0]), np.zeros((4, 1), np.float32)


def read_memory() -> float:
    """Returns the resident memory of this process in MB."""
    gc.collect()
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def use(head: jh.Head) -> None:
    """Uses a head as a search does."""
    head.loss(LABELS, LOGITS)
    head.update_metrics(head.metrics(), None, LOGITS, LABELS).compute(warn=False)


def grow(heads: int, first: int = 0) -> list[float]:
    """Returns the memory after each tenth of so many new heads."""
    found = []
    for i in range(first, first + heads):
        use(jh.BinaryClassHead(thresholds=[(i + 1) / 1e6]))
        if (i - first + 1) % max(1, heads // 10) == 0:
            found.append(read_memory())
    return found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, default=1000)
    parser.add_argument("--calls", type=int, default=10_000)
    given = parser.parse_args()
    begun = time.time()
    memory = grow(given.heads)
    for i, megabytes in enumerate(memory):
        print(f"{(i + 1) * max(1, given.heads // 10):6d} heads {megabytes:8.1f} MB")
    per_head = (memory[-1] - memory[0]) / (given.heads - given.heads // 10)
    print(f"{per_head:.3f} MB a head after the first tenth, {time.time() - begun:.0f} s")
    head = jh.BinaryClassHead()
    use(head)
    before = read_memory()
    for _ in range(given.calls // 2):
        jax.block_until_ready(head.loss(LABELS, LOGITS))
        jax.block_until_ready(head.measure(LABELS, LOGITS).state)
    print(f"{1e3 * (read_memory() - before) / given.calls:.4f} KB a call of one head, {given.calls} calls")


if __name__ == "__main__":
    main()

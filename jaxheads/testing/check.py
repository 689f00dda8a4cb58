"""`check_head`: runs the laws on a head, and says which of them it breaks, with the smallest input that shows it."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxheads.engine import trees
from jaxheads.head import Head, check_unbound
from jaxheads.testing import laws
from jaxheads.testing.case import Case, Skipped

SIZES = (2, 3, 5)  # rows; a law that breaks at the last is tried at the others first


@dataclasses.dataclass(frozen=True)
class Finding:
    """What was found of one law.

    Attributes:
        law: its name.
        broken: what is wrong, with the input that shows it; empty where nothing is.
        skipped: why it was not tried; empty where it was.
        seconds: what it took.
    """

    law: str
    broken: str = ""
    skipped: str = ""
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found of a head, law by law; a notebook cell prints it.

    Attributes:
        head: the head.
        findings: one for each law.
    """

    head: Head
    findings: tuple[Finding, ...]

    @property
    def broken(self) -> tuple[Finding, ...]:
        """The laws that the head breaks."""
        return tuple(finding for finding in self.findings if finding.broken)

    def __repr__(self) -> str:
        lines = [f"Laws of {self.head!r}"]
        for finding in self.findings:
            state = "BROKEN" if finding.broken else f"left out: {finding.skipped}" if finding.skipped else "holds"
            lines.append(f"  {finding.law:<48} {state} ({finding.seconds:.1f} s)")
            lines += [f"    {line}" for line in finding.broken.splitlines()]
        return "\n".join(lines)


def check_head(
    head: Head,
    labels: Callable[[np.random.Generator, tuple[int, ...]], Any] | None = None,
    oracle: Callable[..., Any] | None = None,
    *,
    features: Callable[[np.random.Generator, tuple[int, ...]], Any] | None = None,
    devices: Sequence[Any] | None = None,
    raises: bool = True,
) -> Report:
    """Runs the laws that every head obeys: masks, weights, sums, devices, precision, extremes, bad input, gradients.

    Takes some ten seconds for a small head, most of it compiling.

    Args:
        head: any head, unbound.
        labels: `(rng, lead) -> labels`, legal ones; by default drawn from the head's `label_spec`.
        oracle: `(labels, logits[, weights]) -> losses`, in float64 NumPy, `[..., 1]` or `[..., d]`; or the pair
            `(losses, counts)`, as of a `Term`. Without it no loss is compared with a formula. Rows that look at each
            other see the weights `[..., 1]`.
        features: `(rng, lead) -> features`, for a head that reads any.
        devices: on which rows are spread; by default all there are. With one, that law is left out: start JAX with
            `jax.config.update("jax_num_cpu_devices", 8)`.
        raises: whether a broken law is an error. Else look at the report.

    Returns:
        A `Report`: the laws, and what was found of each.

    Raises:
        AssertionError: the laws that the head breaks, each with the smallest input that shows it.
        ValueError: a head that is bound, or has a `weight_column`; and what a plain call of the head raises.

    >>> import jax.numpy as jnp
    >>> import jaxheads as jh
    >>> from jaxheads.testing import check_head
    >>> class CenteredHead(jh.Head):
    ...     logits_dimension = 1
    ...     coupling = "row"
    ...
    ...     def losses(self, labels, logits):  # a mean over rows, hidden ones too
    ...         return (labels - logits + jnp.mean(logits)) ** 2
    >>> report = check_head(CenteredHead(), devices=(), raises=False)
    >>> report.broken[0].law
    'where=False is absence'
    """
    check_unbound(head)
    if any(leaf.weight_column is not None for leaf in trees.leaves(head)):
        raise ValueError(f"check_head gives the weights itself. Given {head!r}: check it without its weight_column.")
    made = {size: Case.of(head, labels, features, size) for size in SIZES}
    # What a plain call refuses is no law that is broken: labels or features are missing.
    made[SIZES[-1]].values()
    findings = []
    for name, law in laws.of(oracle, jax.devices() if devices is None else list(devices)).items():
        start = time.perf_counter()
        broken, skipped = "", ""
        try:
            law(made[SIZES[-1]])
        except Skipped as reason:
            skipped = str(reason)
        except Exception as error:  # whatever a head raises, it is the law that is told
            broken = _smallest(law, made, error)
        findings.append(Finding(name, broken, skipped, time.perf_counter() - start))
    report = Report(head, tuple(findings))
    if raises and report.broken:
        raise AssertionError(f"{type(head).__name__} breaks {len(report.broken)} of {len(findings)} laws.\n{report!r}")
    return report


def _smallest(law: Callable[[Case], None], made: dict[int, Case], error: Exception) -> str:
    """What is wrong, at the smallest size at which something is."""
    for size in SIZES[:-1]:
        try:
            law(made[size])
        except Skipped:
            continue
        except Exception as smaller:
            return _told(smaller, made[size])
    return _told(error, made[SIZES[-1]])


def _told(error: Exception, case: Case) -> str:
    words = [line for line in str(error).splitlines() if line.strip()][:12]
    return "\n".join([*words, f"labels = {case.labels!r}", f"logits = {case.logits!r}"])

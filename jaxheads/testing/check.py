"""`check_head`: runs the laws on a head, and reports the broken laws, each with the smallest input that shows it."""

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

SIZES = (2, 4, 6)  # numbers of rows; a law that breaks at the last one is tried at the others


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of one law.

    Attributes:
        law: the name of the law.
        broken: the fault, with the input that shows it; empty if there is none.
        skipped: the reason why the law was not tried; empty if it was.
        seconds: the time it took.
    """

    law: str
    broken: str = ""
    skipped: str = ""
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Report:
    """The results of all laws for a head; a notebook cell prints them.

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

    It takes about seven seconds for a small head, mostly for compiling; with several devices, twenty.

    Args:
        head: any head, unbound.
        labels: `(rng, lead) -> labels`, which must be legal; by default drawn from the head's `label_spec`.
        oracle: `(labels, logits[, weights]) -> losses`, in float64 NumPy, `[..., 1]` or `[..., d]`; or the pair
            `(losses, counts)`, as of a `Term`. Without it no loss is compared with a formula. The weights `[..., 1]`
            are for losses whose rows depend on each other.
        features: `(rng, lead) -> features`, for a head that reads features.
        devices: the devices that share the rows; by default all. With one, the law about devices is left out. Start
            JAX with `jax.config.update("jax_num_cpu_devices", 8)` to have more.
        raises: whether a broken law raises an error. If not, read the report.

    Returns:
        A `Report`: the laws and their results.

    Raises:
        AssertionError: the laws that the head breaks, each with the smallest input that shows it.
        ValueError: the head is bound or has a `weight_column`; also any error of a plain call of the head.

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
    # An error of a plain call is no broken law: labels or features are missing.
    made[SIZES[-1]].values()
    findings = []
    for name, law in laws.of(oracle, jax.devices() if devices is None else list(devices)).items():
        start = time.perf_counter()
        broken, skipped = "", ""
        try:
            law(made[SIZES[-1]])
        except Skipped as reason:
            skipped = str(reason)
        except Exception as error:  # any error of the head is reported as a fault under this law
            broken = _find_smallest(law, made, error)
        findings.append(Finding(name, broken, skipped, time.perf_counter() - start))
    report = Report(head, tuple(findings))
    if raises and report.broken:
        raise AssertionError(f"{type(head).__name__} breaks {len(report.broken)} of {len(findings)} laws.\n{report!r}")
    return report


def _find_smallest(law: Callable[[Case], None], made: dict[int, Case], error: Exception) -> str:
    """Returns the fault at the smallest size that shows one."""
    for size in SIZES[:-1]:
        try:
            law(made[size])
        except Skipped:
            continue
        except Exception as smaller:
            return _tell(smaller, made[size])
    return _tell(error, made[SIZES[-1]])


def _tell(error: Exception, case: Case) -> str:
    words = [line for line in str(error).splitlines() if line.strip()][:12]
    return "\n".join([*words, f"labels = {case.labels!r}", f"logits = {case.logits!r}"])

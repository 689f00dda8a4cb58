"""Checks the fields that every head has, and what its class declares. They run when a head is made."""

from jaxheads.contract import AbstractHead
from jaxheads.metrics import Bootstrap, Metric, Slices


def check(head: AbstractHead) -> None:
    """Refuses illegal values of the fields, and declarations of another kind."""
    _check_declarations(head)
    if not (head.name is None or (isinstance(head.name, str) and head.name)):
        raise ValueError(f"name must be a string that is not empty, or None. Given {head.name!r}.")
    if not (head.weight_column is None or isinstance(head.weight_column, str) or callable(head.weight_column)):
        raise ValueError(
            "weight_column must be a key of features or a function features -> weights. Given type: "
            f"{type(head.weight_column).__name__}."
        )
    if not isinstance(head.slices, (Slices, type(None))):
        raise ValueError(f'slices must be jh.Slices("origin", 3), or None. Given {head.slices!r}.')
    if not isinstance(head.bootstrap, (Bootstrap, type(None))):
        raise ValueError(f"bootstrap must be jh.Bootstrap(200), or None. Given {head.bootstrap!r}.")
    if not isinstance(head.extra_metrics, (list, tuple)):
        raise ValueError(f"extra_metrics must be a list of metrics. Given {head.extra_metrics!r}: put it in a list.")
    for metric in head.extra_metrics:
        if not isinstance(metric, Metric):
            raise ValueError(
                f"with_metrics() takes metrics, as jh.metrics.RocAuc(), and functions by name. Given {metric!r}."
            )
    if head.bootstrap is not None and (whole := [m for m in head.extra_metrics if m.unit == "sequence"]):
        raise ValueError(
            f"A bootstrap draws steps one by one, and {whole} counts whole sequences: its intervals would be too "
            f"narrow. Given bootstrap={head.bootstrap!r}. Leave one of them out."
        )


def _check_declarations(head: AbstractHead) -> None:
    """Refuses a field, or an attribute of an old version, whose name the contract uses for something else."""
    name = type(head).__name__
    flags = {
        "signed": head.signed,
        "per_logit_weights": head.per_logit_weights,
        "per_logit_where": head.per_logit_where,
        "reads_slices": head.reads_slices,
        "takes_linear": head.takes_linear,
        "samples": head.samples,
    }
    for flag, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(
                f"{name}.{flag} is a declaration, True or False: see jaxheads.contract. Given {value!r}. If it is a "
                "field of your own, give it another name."
            )
    if not isinstance(head.wrapped, (AbstractHead, type(None))):
        raise ValueError(
            f"{name}.wrapped is a declaration, a head or None: see jaxheads.contract. Given {head.wrapped!r}. If it is "
            "a field of your own, give it another name."
        )
    if not callable(head.parts):
        raise ValueError(f"{name}.parts is a hook: see jaxheads.contract. Give the field another name.")
    if hasattr(type(head), "rowwise"):
        raise ValueError(
            f'{name} declares rowwise, which is now coupling: coupling = "row" where no row looks at another, "batch" '
            "where rows do."
        )

"""What a head becomes on the machines that are not here: lowered by `jax.export` for NVIDIA, AMD and Google's chips."""

import jax
import numpy as np
import pytest
from devices import draw
from jax import export
from zoo import ZOO, marked

import jaxheads as jh

# Quick: a histogram, ids of classes, learned and running fields.
QUICK = ("binary_soft_grid", "multi_class", "nested")
each = pytest.mark.parametrize("entry", marked(ZOO, quick=QUICK))


def program_of(entry):
    """Loss, gradient and an update of the metrics in one function, and its arguments."""
    params = entry.params()

    def step(metrics, batch):
        def loss(logits):
            return entry.head.loss(**{**batch, "logits": logits}, params=params)

        return jax.value_and_grad(loss)(batch["logits"]), entry.head.update_metrics(
            metrics, None, **batch, params=params
        )

    metrics, batch = entry.head.metrics(), draw(entry)
    # Metrics travel as their array: an exported program knows plain containers alone.
    flat, structure = jax.tree.flatten((metrics, batch))

    def plain(*leaves):
        return jax.tree.leaves(step(*structure.unflatten(leaves)))

    return jax.jit(plain), flat


@each
def test_every_head_is_lowered_for_every_platform(entry):
    """GPUs find a place in memory; a TPU multiplies, and neither scatters nor sorts."""
    has_histogram = entry.head.metrics().state.shape[0] > 100
    program, flat = program_of(entry)
    traced = program.trace(*flat)
    for platform in ("cuda", "rocm", "tpu"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.scatter" in text) == (has_histogram and platform != "tpu")
        assert "stablehlo.sort" not in text


def test_a_program_for_one_kind_of_machine_is_refused_on_another():
    program, flat = program_of(next(entry for entry in ZOO if entry.name == "regression"))
    for platform in ("cuda", "rocm", "tpu"):
        exported = export.export(program, platforms=[platform])(*flat)
        assert exported.platforms == (platform,)
        with pytest.raises(ValueError, match=f"(?i){platform}"):
            exported.call(*flat)


def test_a_gradient_of_class_ids_is_no_scatter_on_a_tpu():
    """The selection of a class's logit is a comparison, whose gradient is one too."""
    head = jh.MultiClassHead(1000)
    labels, logits = np.zeros((8, 1), np.int32), np.zeros((8, 1000), np.float32)
    gradient = jax.jit(jax.grad(lambda logits: head.loss(labels, logits)))
    for platform in ("cuda", "tpu"):
        text = export.export(gradient, platforms=[platform])(logits).mlir_module()
        assert "stablehlo.scatter" not in text

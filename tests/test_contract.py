"""What authors of heads rely on, beyond the laws: heads inside heads, running state, features, structure."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import OrdinalHead, PriorCorrectedHead, SurvivalHead, TemperatureHead

import jaxheads as jh


class BothHead(jh.Head):
    """A head that learns a shift and keeps a count."""

    shift: jax.Array = jh.learned(lambda head, key: jnp.zeros((1,)))
    seen: jax.Array = jh.running(lambda head: jnp.zeros(()))
    steps: jax.Array = jh.running(lambda head: jnp.zeros((), jnp.int32))

    logits_dimension = 1

    def losses(self, labels, logits):
        return (labels - logits - jnp.expand_dims(self.shift, 0)) ** 2

    def advance(self, labels, logits, weights, psum):
        above = (labels > jnp.expand_dims(self.shift, 0)).astype(jnp.float32)
        return {"seen": self.seen + psum(jnp.sum(weights * above))}


class PanelHead(jh.Head):
    """Heads in a tuple, with a default head beside."""

    members: tuple[jh.Head, ...] = jh.subheads()
    spare: jh.Head = jh.subheads(default=OrdinalHead(3))

    logits_dimension = 1

    def losses(self, labels, logits):
        return sum((member.losses(labels, logits) for member in self.members), jnp.zeros_like(logits))


LABELS, LOGITS = np.array([1.0, 0.0, 1.0], np.float32), np.array([[0.5], [-1.0], [2.0]], np.float32)


def test_bound_heads_nest():
    inner: Any = OrdinalHead(4).bind({"cuts": jnp.array([-1.0, 0.0, 1.0])})
    head = TemperatureHead(inner)
    assert "cuts=<float32[3]>" in repr(head)
    renamed: Any = dataclasses.replace(head, name="n")
    np.testing.assert_array_equal(renamed.inner.cuts, inner.cuts)
    assert jax.tree.structure(head.bind({"log_temperature": jnp.zeros(1)})).num_leaves == 2
    params = {"log_temperature": jnp.zeros(1), "inner": {"cuts": inner.cuts}}
    labels = np.array([0, 3, 1])
    expected = OrdinalHead(4).loss(labels, LOGITS, params=params["inner"])
    for bound in (head.bind({"log_temperature": jnp.zeros(1)}), TemperatureHead(OrdinalHead(4)).bind(params)):
        np.testing.assert_allclose(bound.loss(labels, LOGITS), expected, rtol=1e-6)
        assert bound.metrics().head == TemperatureHead(OrdinalHead(4))
    with pytest.raises(ValueError, match="bound to parameters"):
        hash(head)


def test_heads_in_a_list_become_a_tuple_and_print():
    panel = PanelHead([OrdinalHead(4), OrdinalHead(4, name="second")])  # pyright: ignore[reportArgumentType]
    assert panel.members == (OrdinalHead(4), OrdinalHead(4, name="second"))
    assert repr(panel) == "PanelHead(members=(OrdinalHead(), OrdinalHead(name='second')))"
    params = panel.init(jax.random.key(0))
    assert set(params) == {"0", "second", "spare"}
    bound = panel.bind(params)
    assert "spare=OrdinalHead(n_classes=3, cuts=<float32[2]>)" in repr(bound)
    assert {panel: 1}[dataclasses.replace(panel)] == 1
    with pytest.raises(ValueError, match=r"members holds heads(.|\n)*Given 3"):
        PanelHead([3])  # pyright: ignore[reportArgumentType]  # what is tested


@pytest.mark.parametrize("names", [("x", "x"), ("1", None), ("spare",), ("name",)], ids=str)
def test_heads_whose_parameters_would_share_a_name_are_refused(names):
    with pytest.raises(ValueError, match="names clash"):
        PanelHead(tuple(OrdinalHead(4, name=name) for name in names))


def test_a_wrapper_takes_the_names_of_its_inner_head():
    class NamedHead(jh.Head):
        inner: jh.Head = jh.subheads()
        logits_dimension = 1

        @property
        def label_spec(self):
            return self.inner.label_spec

        @property
        def vocabulary(self):
            return self.inner.vocabulary

        def losses(self, labels, logits):
            return self.inner.losses(labels, logits)

    head = NamedHead(jh.BinaryClassHead(label_vocabulary=("no", "yes")))
    assert head.loss(["yes", "no"], LOGITS[:2]) == jh.BinaryClassHead().loss([1, 0], LOGITS[:2])


@pytest.mark.parametrize("column", ["w", lambda features: None], ids=["key", "function"])
def test_a_weight_column_that_gives_no_weights_is_refused(column):
    with pytest.raises(ValueError, match="gave None"):
        jh.BinaryClassHead(column).loss(LABELS, LOGITS, {"w": None})


def test_parameters_and_state_of_the_same_inner_head():
    head = TemperatureHead(BothHead())
    params, state = jax.device_get((head.init(jax.random.key(0)), head.init_state()))
    assert jax.tree.map(np.shape, params) == {"log_temperature": (1,), "inner": {"shift": (1,)}}
    assert jax.tree.map(np.shape, state) == {"inner": {"seen": (), "steps": ()}}
    where = [True, True, False]
    new = jax.jit(lambda state: head.update_state(state, LABELS, LOGITS, params=params, where=where))(state)
    assert (new["inner"]["seen"], new["inner"]["steps"]) == (1, 0)
    loss = head.bind(params).bind(new).loss(LABELS, LOGITS)
    z = LOGITS.astype(np.float64) * np.exp(-0.25)
    np.testing.assert_allclose(loss, ((LABELS[:, None] - z) ** 2).mean(), rtol=1e-6)
    with pytest.raises(ValueError, match="running state of"):
        head.update_state({"inner": {**state["inner"], "shift": np.zeros(1)}}, LABELS, LOGITS, params=params)


def test_running_state_of_an_inner_head_is_not_forgotten():
    class ForgetfulHead(jh.Head):
        inner: jh.Head = jh.subheads()
        logits_dimension = 1

        def losses(self, labels, logits):
            return self.inner.losses(labels, logits)

    head = ForgetfulHead(PriorCorrectedHead())
    with pytest.raises(ValueError, match=r"ForgetfulHead.advance must give(.|\n)*inner(.|\n)*counts"):
        jax.eval_shape(lambda: head.update_state(head.init_state(), LABELS, LOGITS))


@pytest.mark.parametrize(
    "new",
    [{"stranger": np.float32(0)}, {"seen": np.zeros(2, np.float32)}, {"seen": np.int32(0)}],
    ids=["key", "shape", "dtype"],
)
def test_advance_gives_what_init_state_made(new):
    class WrongHead(jh.Head):
        seen: jax.Array = jh.running(lambda head: jnp.zeros(()))
        logits_dimension = 1

        def losses(self, labels, logits):
            return (labels - logits) ** 2

        def advance(self, labels, logits, weights, psum):
            return new

    head = WrongHead()
    with pytest.raises(ValueError, match=r"WrongHead\.advance must give the running state"):
        jax.eval_shape(lambda: head.update_state(head.init_state(), LABELS, LOGITS))


@pytest.mark.parametrize("rows", [10, 20_001])
def test_features_of_any_shape_reach_large_batches(rows):
    class ScaledHead(jh.Head):
        logits_dimension = 1
        coupling = "row"

        def losses(self, labels, logits, features):  # pyright: ignore[reportIncompatibleMethodOverride]  # a third
            table = features["table"][features["city"]]
            return features["scale"][:, None] * table[:, None] * (labels - logits) ** 2

    rng = np.random.default_rng(0)
    labels, logits = (rng.normal(size=(rows, 1)).astype(np.float32) for _ in range(2))
    features = {"scale": rng.random(rows).astype(np.float32), "table": np.arange(3, dtype=np.float32)}
    features |= {"city": rng.integers(0, 3, rows), "name": np.array(["x"] * rows)}
    expected = features["scale"] * features["table"][features["city"]] * ((labels - logits) ** 2)[:, 0]
    measured = ScaledHead().measure(labels, logits, features)
    np.testing.assert_allclose(measured.compute()["average_loss"], expected.mean(dtype=np.float64), rtol=1e-6)


def test_a_bad_row_shows_even_where_nothing_is_counted():
    """The only event is illegal, so the count is 0; an empty batch would have loss 0."""
    head = SurvivalHead(loss_reduction="mean")
    labels = {"time": np.ones((1, 1), np.float32), "event": np.array([[2]])}
    loss, gradient = jax.jit(jax.value_and_grad(head.loss, argnums=1))(labels, np.zeros((1, 1), np.float32))
    assert np.isnan(loss)
    assert np.isnan(gradient).all()


def test_the_factory_takes_numpy_integers():
    assert jh.binary_or_multi_class_head(np.int64(3)) == jh.MultiClassHead(3)  # pyright: ignore[reportArgumentType]

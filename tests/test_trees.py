"""Trees with leaves that are not trained, and trees that do not match."""

import dataclasses
from typing import Any, NamedTuple

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, OPTIMIZERS
from flax import nnx

import adam_jax
from adam_jax import trees

every_optimizer = pytest.mark.parametrize("case", [CASES[name] for name in OPTIMIZERS], ids=OPTIMIZERS)
PARAMS = {
    "w": jnp.ones((2, 3)),
    "steps": jnp.arange(4),
    "flags": jnp.array([True, False]),
    "key": jax.random.key(0),
    "nothing": None,
    "empty": jnp.zeros((0, 2)),
    "scalar": 2.0,
}


@every_optimizer
def test_leaves_that_are_not_trained_have_no_state_and_stay_as_they_are(case):
    tx = case.make()

    def loss(params):
        noise = jax.random.normal(params["key"], (2, 3))
        return jnp.sum(params["w"] * noise) + params["scalar"] ** 2 + jnp.sum(params["steps"] * 0.0)

    @jax.jit
    def step(params, state):
        gradients = jax.grad(loss, allow_int=True)(params)
        assert gradients["steps"].dtype == jax.dtypes.float0
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for leaf in ("steps", "flags", "key", "nothing"):
        assert trees.is_absent(optax.tree_utils.tree_get(state, "mu")[leaf])
        assert trees.is_absent(optax.tree_utils.tree_get(state, "nu")[leaf])
    for _ in range(3):
        params, state = step(params, state)
    for leaf in ("steps", "flags", "key", "empty"):
        chex.assert_trees_all_equal(params[leaf], PARAMS[leaf])
    assert not (params["w"] == PARAMS["w"]).any()


def test_integer_leaves_stay_as_they_are_eagerly_too():
    tx = adam_jax.adamw(0.1)
    params = {"w": jnp.ones(2), "n": jnp.arange(3)}
    gradients = {"w": jnp.ones(2), "n": np.zeros(3, jax.dtypes.float0)}
    updates, _ = tx.update(gradients, tx.init(params), params)
    moved = optax.apply_updates(params, updates)
    chex.assert_trees_all_equal(moved["n"], params["n"])
    assert moved["n"].dtype == params["n"].dtype


def test_none_in_params_in_gradients_and_in_both():
    params = {"a": jnp.ones(2), "b": None, "c": jnp.ones(3)}
    tx = adam_jax.adam(0.1)
    state = tx.init(params)
    updates, after = jax.jit(tx.update)({"a": jnp.ones(2), "b": None, "c": None}, state, params)
    assert updates["b"] is None
    assert updates["c"] is None
    np.testing.assert_allclose(updates["a"], -0.1)
    chex.assert_trees_all_equal(after[0].mu["c"], state[0].mu["c"])  # no gradient, no change


@every_optimizer
def test_an_equinox_model_may_be_given_whole(case):
    tx = case.make()
    model = eqx.nn.MLP(2, 1, 4, 1, activation=jax.nn.tanh, key=jax.random.key(0))
    state = tx.init(model)

    @eqx.filter_jit
    def step(model, state):
        gradients = eqx.filter_grad(lambda m: jnp.sum(m(jnp.ones(2))))(model)
        updates, state = tx.update(gradients, state, model)
        return eqx.apply_updates(model, updates), state

    moved, _ = step(model, state)
    assert moved.activation is model.activation
    assert not (moved.layers[0].weight == model.layers[0].weight).all()


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        (
            {"w": jnp.ones(3), "more": {"b": jnp.ones(2)}},
            r"the gradient at \['w'\] has shape \(3,\), but its param had \(2,\)",
        ),
        ({"w": jnp.ones(2)}, r"the gradients have no leaf at \['more'\]\['b'\], which the params given to init have"),
        (
            {"w": jnp.ones(2), "more": {"c": jnp.ones(2)}},
            r"a leaf at \['more'\]\['c'\] that the params given to init do not",
        ),
        (
            {"w": jnp.arange(2), "more": {"b": jnp.ones(2)}},
            r"the gradient at \['w'\] has dtype int32, but its param is float",
        ),
        ({"w": jnp.ones(2) + 1j, "more": {"b": jnp.ones(2)}}, r"the gradient at \['w'\] has dtype complex64, but its first"),
        ([jnp.ones(2), jnp.ones(2)], r"the gradients have a leaf at \[0\] that the params given to init do not have"),
    ],
)
def test_gradients_that_do_not_match_name_the_first_leaf(gradients, message: str):
    params = {"w": jnp.ones(2), "more": {"b": jnp.ones(2)}}
    tx = adam_jax.scale_by_adam()
    with pytest.raises(ValueError, match=message):
        jax.jit(tx.update)(gradients, tx.init(params))


def test_a_gradient_for_a_leaf_that_was_not_trained_is_an_error():
    tx = adam_jax.scale_by_adam()
    with pytest.raises(ValueError, match=r"a float32 leaf at \['n'\], but the params given to init have no floating-point"):
        tx.update({"n": jnp.ones(3)}, tx.init({"n": jnp.arange(3)}))


def test_paths_choose_learning_rates_decays_and_masks():
    params = {"embedding": {"w": jnp.ones(2)}, "head": {"w": jnp.ones(2), "b": jnp.ones(2)}}
    no_bias = adam_jax.label_by_path({"/b$": False}, True)
    choose = adam_jax.label_by_path({"^embedding/": "slow"}, "rest")
    tx = optax.partition(
        {"slow": adam_jax.adam(0.01, b2=0.9), "rest": adam_jax.adamw(0.1, weight_decay=1.0, mask=no_bias)}, choose
    )
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    np.testing.assert_allclose(updates["embedding"]["w"], -0.01, rtol=1e-6)
    np.testing.assert_allclose(updates["head"]["w"], -0.2, rtol=1e-6)
    np.testing.assert_allclose(updates["head"]["b"], -0.1, rtol=1e-6)


def test_a_path_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"must find a leaf each, got 'decoder', but the paths are \['w'\]"):
        adam_jax.label_by_path({"decoder": 1}, 0)({"w": 1.0})
    with pytest.raises(ValueError, match="must be regular expressions, got"):
        adam_jax.label_by_path({"(": 1}, 0)


class Attention(NamedTuple):
    """Of attributes that attention has."""

    query: jax.Array
    value: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class AsDataclass:
    """The same."""

    query: jax.Array
    value: jax.Array


class AsModule(eqx.Module):
    """The same."""

    query: jax.Array
    value: jax.Array


@pytest.mark.parametrize("kind", [Attention, AsDataclass, AsModule])
def test_an_attribute_called_value_keeps_its_name_in_masks_storages_draws_and_messages(kind: Any):
    params, gradients = (kind(*(jnp.full(4000, x) for x in pair)) for pair in ((1.0, 1.0), (1.3, 1.3)))
    no_value = adam_jax.label_by_path({"^value$": False}, True)
    decay = adam_jax.add_decayed_weights(0.5, no_value)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = decay.update(zeros, decay.init(params), params)
    assert (updates.query[0], updates.value[0]) == (0.5, 0.0)
    narrow = adam_jax.scale_by_adam(storage=lambda path: "bfloat16" if path == ".value" else "float32")
    _, state = narrow.update(gradients, narrow.init(params))
    assert (state.mu.query.dtype, state.mu.value.dtype) == (jnp.float32, jnp.bfloat16)
    both = adam_jax.scale_by_adam(storage="bfloat16")
    _, state = both.update(gradients, both.init(params))
    assert (state.mu.query != state.mu.value).any()  # each leaf draws from its own sequence
    with pytest.raises(ValueError, match=r"the gradient at \.value has shape \(3,\)"):
        both.update(kind(gradients.query, jnp.ones(3)), state, params)


class Net(nnx.Module):
    """A variable called value, and one that holds a tree."""

    def __init__(self):
        self.value = nnx.Param(jnp.ones(2))
        self.heads = nnx.Param(Attention(jnp.ones(2), jnp.ones(2)))


def test_a_variable_of_flax_and_the_array_in_it_have_one_path_also_where_it_holds_a_tree():
    seen: dict[str, set[str]] = {"init": set(), "update": set()}
    now = "init"

    def storage(path: str) -> str:
        seen[now].add(path)
        return "float32"

    model = Net()
    no_value = adam_jax.label_by_path({"value$": False}, True)
    tx = optax.chain(adam_jax.scale_by_adam(storage=storage), adam_jax.add_decayed_weights(1.0, no_value))
    optimizer = nnx.Optimizer(model, optax.chain(tx, optax.scale(-0.1)), wrt=nnx.Param)
    now = "update"
    gradients = nnx.grad(lambda m: sum(x.sum() for x in jax.tree.leaves(nnx.state(m))))(model)
    optimizer.update(model, gradients)
    assert seen["update"] <= {"['heads'].query", "['heads'].value", "['value']"} == seen["init"]
    query, value, own = jax.tree.leaves(nnx.state(model))  # of the heads, and the model's
    np.testing.assert_allclose([own[0], query[0], value[0]], [0.9, 0.8, 0.9], rtol=1e-6)


@pytest.mark.parametrize(
    ("tree", "expression", "found"),
    [
        ({"a.b": 1.0, "a": {"b": 2.0}}, r"^a\.b$", {"a.b": True, "a": {"b": False}}),
        ({"x[0]": 1.0, "x": [2.0]}, "^x/0$", {"x[0]": False, "x": [True]}),
        ({1: 1.0, 10: 2.0}, "^1$", {1: True, 10: False}),
        ([1.0, (2.0, 3.0)], "^1/0$", [False, (True, False)]),
        ({(1, 2): 1.0, (1, 3): 2.0}, r"^\(1, 2\)$", {(1, 2): True, (1, 3): False}),
        (1.0, "^$", True),
    ],
)
def test_any_key_can_be_named_in_an_expression(tree: Any, expression: str, found: Any):
    assert adam_jax.label_by_path({expression: True}, False)(tree) == found


@jax.tree_util.register_pytree_with_keys_class
class OfBothKeys:
    """Two leaves, at the keys 1 and "1"."""

    def __init__(self, *children: Any):
        self.children = children

    def tree_flatten_with_keys(self) -> Any:
        """The children with their keys."""
        return [(jax.tree_util.DictKey(key), child) for key, child in zip((1, "1"), self.children, strict=True)], None

    @classmethod
    def tree_unflatten(cls, _: Any, children: Any) -> Any:
        """Of children."""
        return cls(*children)


@pytest.mark.parametrize("tree", [{"a/b": 1.0, "a": {"b": 2.0}}, {"a": OfBothKeys(1.0, 2.0)}])
def test_two_leaves_that_no_expression_tells_apart_are_an_error_only_where_they_are_asked_for(tree: Any):
    shared = "a/b" if "a/b" in tree else "a/1"
    with pytest.raises(ValueError, match=f"two leaves are at {shared}"):
        adam_jax.label_by_path({f"^{shared}$": 1}, 0)(tree)
    labels = adam_jax.label_by_path({"^z$": 1}, 0)({**tree, "z": 3.0})
    assert jax.tree.leaves(labels) == [0, 0, 1]


@pytest.mark.parametrize(
    "tree",
    [
        {"a.b": 0, "a": {"b": 0}, "a']['b": 0, "['a']['b']": 0},
        {"a/b": 0, "a": {"b": 0}},
        OfBothKeys(0, 0),
    ],
)
def test_leaves_whose_keys_differ_in_anything_draw_apart(tree: Any):
    tx, g = adam_jax.scale_by_adam(storage="bfloat16"), jax.tree.map(lambda _: jnp.full(1000, 1.2345), tree)
    leaves = jax.tree.leaves(tx.update(g, tx.init(g))[1].mu)
    assert all((a != b).any() for i, a in enumerate(leaves) for b in leaves[:i])


WHOLE = {"emb": {"w": jnp.ones(2)}, "head": {"w": jnp.ones(2), "b": jnp.ones(2)}, "none": None}
NO_BIAS = adam_jax.label_by_path({"/b$": False}, True)
OF_EMB = adam_jax.label_by_path({"^emb/": "e"}, "r")
NO_HEAD = adam_jax.label_by_path({"^head/": False}, True)


def _decayed(mask: Any) -> optax.GradientTransformationExtraArgs:
    return adam_jax.adamw(0.1, weight_decay=1.0, mask=mask)


@pytest.mark.parametrize(
    "make",
    {
        "alone": lambda: _decayed(NO_BIAS),
        "partition": lambda: optax.partition({"e": _decayed(NO_HEAD), "r": _decayed(NO_BIAS)}, OF_EMB),
        "groups of whole subtrees": lambda: optax.partition(
            {"e": _decayed(True), "r": _decayed(NO_BIAS)}, {"emb": "e", "head": "r", "none": None}
        ),
        "nested partition": lambda: optax.partition(
            {"e": _decayed(NO_BIAS), "r": optax.partition({"b": adam_jax.adam(0.1), "w": _decayed(NO_BIAS)},
                                                          adam_jax.label_by_path({"/b$": "b"}, "w"))}, OF_EMB),
        "masked": lambda: optax.chain(optax.masked(_decayed(NO_BIAS), adam_jax.label_by_path({"^none$": False}, True))),
        "MultiSteps": lambda: optax.MultiSteps(_decayed(NO_BIAS), 1).gradient_transformation(),
        "named_chain": lambda: optax.named_chain(("clip", adam_jax.clip_by_global_norm(1.0)), ("adam", _decayed(NO_BIAS))),
        "skip_nonfinite": lambda: adam_jax.skip_nonfinite(
            optax.partition({"e": _decayed(NO_BIAS), "r": _decayed(NO_BIAS)}, OF_EMB)),
        "in_float32": lambda: adam_jax.in_float32(_decayed(NO_BIAS), 16),
    }.values(),
)  # fmt: skip
def test_masks_by_path_say_what_they_say_alone_in_every_wrapper(make: Any):
    tx, zeros = optax.with_extra_args_support(make()), jax.tree.map(jnp.zeros_like, WHOLE)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(WHOLE), WHOLE)
    np.testing.assert_allclose(updates["emb"]["w"], -0.1, rtol=1e-6)
    np.testing.assert_allclose(updates["head"]["w"], -0.1, rtol=1e-6)
    np.testing.assert_array_equal(updates["head"]["b"], 0.0)


def test_a_typing_error_is_caught_in_wrappers_that_show_the_whole_tree_and_in_labels():
    wrong = adam_jax.label_by_path({"/bias$": False}, True)
    model = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
    adapted = eqx.partition(model, eqx.tree_at(lambda m: m.layers[0].weight, jax.tree.map(lambda _: False, model), True))[0]
    for tx, params in (
        (_decayed(wrong), WHOLE),
        (optax.MultiSteps(_decayed(wrong), 2).gradient_transformation(), WHOLE),
        (adam_jax.in_float32(_decayed(wrong)), WHOLE),
        (optax.partition({"e": adam_jax.adam(), "r": adam_jax.adam()}, adam_jax.label_by_path({"^embed": "e"}, "r")), WHOLE),
        (_decayed(adam_jax.label_by_path({"baias$": False}, True)), adapted),
    ):
        with pytest.raises(ValueError, match="labels must find a leaf each"):
            tx.init(params)
    tx = _decayed(adam_jax.label_by_path({"bias$": False}, True))  # of which this tree has none left
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, adapted), tx.init(adapted), adapted)
    np.testing.assert_allclose(updates.layers[0].weight, -0.1 * adapted.layers[0].weight, rtol=1e-6)


@pytest.mark.parametrize("labels", [OF_EMB, {"emb": "e", "head": "r", "none": None}], ids=["leaves", "subtrees"])
def test_a_typing_error_in_a_mask_of_one_group_is_a_warning(labels: Any):
    wrong = adam_jax.label_by_path({"/bias$": False}, True)
    tx = optax.partition({"e": adam_jax.adam(0.1), "r": _decayed(wrong)}, labels)
    with pytest.warns(UserWarning, match=r"got '/bias\$', but the paths are \['emb.*, and emb.* was left out"):
        tx.init(WHOLE)


def test_a_name_that_another_group_has_is_none_where_leaves_are_labelled_and_a_warning_where_subtrees_are():
    def state(labels: Any) -> Any:
        return optax.partition({"e": _decayed(NO_BIAS), "r": _decayed(NO_BIAS)}, labels).init(WHOLE)

    with pytest.warns(UserWarning, match="a typing error, unless that is more than one leaf"):
        of_subtrees = state({"emb": "e", "head": "r", "none": None})
    chex.assert_trees_all_equal(*map(jax.tree.leaves, (of_subtrees, state(OF_EMB))))


def test_a_mask_by_path_is_asked_about_the_params_where_gradients_are_none():
    tx = _decayed(NO_BIAS)
    gradients = {**WHOLE, "head": {"w": jnp.zeros(2), "b": None}, "emb": {"w": None}}
    updates, _ = jax.jit(tx.update)(gradients, tx.init(WHOLE), WHOLE)
    assert updates["emb"]["w"] is None
    assert updates["head"]["b"] is None
    np.testing.assert_allclose(updates["head"]["w"], -0.1, rtol=1e-6)
    of_params = optax.partition({"e": adam_jax.adam(0.1), "r": _decayed(NO_BIAS)}, OF_EMB(WHOLE))  # the labels as a tree
    updates, _ = jax.jit(of_params.update)(gradients, of_params.init(WHOLE), WHOLE)
    np.testing.assert_allclose(updates["head"]["w"], -0.1, rtol=1e-6)


def test_optax_maps_states_with_more_trees_beside():
    params = {**WHOLE, "n": jnp.arange(3), "half": jnp.ones(2, jnp.bfloat16)}
    names = jax.tree.map(lambda x: f"of {x.dtype}", params)
    for tx in (
        optax.adam(0.1),
        adam_jax.adam(0.1),
        adam_jax.in_float32(adam_jax.adam(0.1), 8),
        adam_jax.skip_nonfinite(optax.chain(adam_jax.adam(0.1, storage="bfloat16"), adam_jax.average_params())),
    ):
        state = tx.init(params)
        mapped = optax.tree_utils.tree_map_params(
            tx, lambda leaf, param, name: (name, leaf.ndim in (0, param.ndim)), state, params, names,
            transform_non_params=lambda _: ("none of them", True),
        )  # fmt: skip
        found = jax.tree.leaves(mapped, is_leaf=lambda x: isinstance(x, tuple) and len(x) == 2 and isinstance(x[1], bool))
        assert {name for name, _ in found} >= {"of float32", "of int32", "of bfloat16"}
        assert all(fits for _, fits in found)


def test_optax_maps_states_that_are_labelled_by_path():
    tx = optax.partition({"e": adam_jax.adam(0.1), "r": _decayed(NO_BIAS)}, OF_EMB)  # asked about a tree without leaves, too
    mapped = optax.tree_utils.tree_map_params(tx, lambda _: "moment", tx.init(WHOLE), transform_non_params=lambda _: "rest")
    assert jax.tree.leaves(mapped).count("moment") == 2 * 3


def test_paths_are_given_as_a_dictionary_of_strings():
    for labels in (["b"], {1: "b"}):
        with pytest.raises(TypeError, match="labels must be a dictionary from regular expressions to labels"):
            adam_jax.label_by_path(labels, "r")
    with pytest.raises(TypeError, match="mask must hold True or False, got 'e'"):
        adam_jax.adamw(mask=OF_EMB).init(WHOLE)

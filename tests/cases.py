"""The registry of transformations: test_contract.py holds every row to every promise. New ones get a row."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import optax

import adam_jax
from adam_jax import norms, storage


class Case(NamedTuple):
    """A transformation with one choice of its settings: `factory(**numbers, **choices)`.

    `numbers` are the settings that may also be traced or injected, `choices` the structural ones.
    """

    factory: Callable[..., Any]
    numbers: Mapping[str, float]
    choices: Mapping[str, Any]

    def make(self, **numbers: Any) -> optax.GradientTransformationExtraArgs:
        """The transformation, with some numbers replaced."""
        return self.factory(**{**self.numbers, **numbers}, **self.choices)


EIGHT_BITS = {"storage": storage.int8(smallest=0)}


def _case(factory: Callable[..., Any], numbers: str, **choices: Any) -> Case:
    values = {"b1": 0.8, "b2": 0.99, "eps": 1e-6, "eps_root": 1e-9, "learning_rate": 0.1, "weight_decay": 0.01, "p": 3.0}
    values |= {"max_norm": 0.5, "decay": 0.9}
    return Case(factory, {name: values[name] for name in numbers.split()}, choices)


CASES: dict[str, Case] = {
    "scale_by_adam": _case(adam_jax.scale_by_adam, "b1 b2 eps eps_root"),
    "scale_by_adam, root": _case(adam_jax.scale_by_adam, "b1 b2 eps eps_root", storage="root"),
    "scale_by_adam, raw": _case(adam_jax.scale_by_adam, "b1 b2 eps", bias_correction=False),
    "scale_by_adam, eps_hat, nesterov": _case(adam_jax.scale_by_adam, "b1 b2 eps", eps_hat=True, nesterov=True),
    "scale_by_adam, bfloat16": _case(adam_jax.scale_by_adam, "b1 b2 eps", storage="bfloat16"),
    "scale_by_adam, bfloat16 first moments": _case(adam_jax.scale_by_adam, "b1 b2 eps", mu_dtype="bfloat16"),
    "scale_by_adam, int8": _case(adam_jax.scale_by_adam, "b1 b2 eps", **EIGHT_BITS),
    "scale_by_adamax": _case(adam_jax.scale_by_adamax, "b1 b2 eps"),
    "scale_by_lp": _case(adam_jax.scale_by_lp, "p b1 b2 eps"),
    "scale_by_norm": _case(adam_jax.scale_by_norm, "b1 b2 eps", norm=norms.Largest(norms.Infinity())),
    "scale_by_lp, int8": _case(adam_jax.scale_by_lp, "p b1 b2 eps", **EIGHT_BITS),
    "scale_by_adamax, int8": _case(adam_jax.scale_by_adamax, "b1 b2 eps", **EIGHT_BITS),
    "scale_by_amsgrad, int8, nesterov": _case(adam_jax.scale_by_amsgrad, "b1 b2 eps", nesterov=True, **EIGHT_BITS),
    "scale_by_amsgrad": _case(adam_jax.scale_by_amsgrad, "b1 b2 eps eps_root"),
    "scale_by_amsgrad, corrected, root": _case(adam_jax.scale_by_amsgrad, "b1 b2 eps", max_of="corrected", storage="root"),
    "scale_by_bias_correction": _case(adam_jax.scale_by_bias_correction, "b1 b2"),
    "scale_by_learning_rate": _case(adam_jax.scale_by_learning_rate, "learning_rate"),
    "add_decayed_weights": _case(adam_jax.add_decayed_weights, "weight_decay"),
    "clip_by_global_norm": _case(adam_jax.clip_by_global_norm, "max_norm"),
    "average_params": _case(adam_jax.average_params, "decay"),
    "adam": _case(adam_jax.adam, "learning_rate b1 b2 eps"),
    "adamw": _case(adam_jax.adamw, "learning_rate b1 b2 eps weight_decay"),
    "nadam": _case(adam_jax.nadam, "learning_rate b1 b2 eps"),
    "nadamw": _case(adam_jax.nadamw, "learning_rate b1 b2 eps weight_decay"),
    "adamax": _case(adam_jax.adamax, "learning_rate b1 b2 eps"),
    "adamaxw": _case(adam_jax.adamaxw, "learning_rate b1 b2 eps weight_decay"),
    "amsgrad": _case(adam_jax.amsgrad, "learning_rate b1 b2 eps"),
}
OPTIMIZERS = ("adam", "adamw", "nadam", "nadamw", "adamax", "adamaxw", "amsgrad")

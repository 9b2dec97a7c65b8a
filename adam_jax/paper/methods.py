"""The optimizers that the paper compares, by name, each with one colour everywhere. Adam is ours, the others Optax's."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import optax

import adam_jax

__all__ = ["METHODS", "Method", "make"]

Hyper = Mapping[str, jax.Array]


@dataclass(frozen=True)
class Method:
    """An optimizer as it stands in a legend."""

    label: str  # its name in the paper's legends
    colour: str  # its colour in every picture
    # from a step size (a number or a schedule) and the other settings to a transformation
    build: Callable[[optax.ScalarOrSchedule, Hyper], optax.GradientTransformation]
    anneals_itself: bool = False  # whether alpha / sqrt(t) is left out for it
    dashed: bool = False  # drawn so, beside another of its colour


METHODS = {
    "adam": Method("Adam", "#d62728", lambda rate, h: adam_jax.adam(rate, h.get("b1", 0.9), h.get("b2", 0.999))),
    "adam_uncorrected": Method(
        "Adam without bias correction",
        "#7f7f7f",
        lambda rate, h: adam_jax.adam(rate, h.get("b1", 0.9), h.get("b2", 0.999), bias_correction=False),
    ),
    "adagrad": Method("AdaGrad", "#1f77b4", lambda rate, _: _adagrad(rate)),
    "adagrad_constant": Method("AdaGrad, constant alpha", "#1f77b4", lambda rate, _: _adagrad(rate), True, dashed=True),
    "rmsprop": Method("RMSProp", "#9467bd", lambda rate, _: optax.rmsprop(rate, decay=0.9, eps=1e-8)),
    "sgd": Method("SGDNesterov", "#2ca02c", lambda rate, _: optax.sgd(rate, momentum=0.9, nesterov=True)),
    "adadelta": Method("AdaDelta", "#ff7f0e", lambda rate, _: optax.adadelta(rate, rho=0.95, eps=1e-6)),
    "lbfgs": Method("L-BFGS", "#8c564b", lambda _rate, _: optax.lbfgs(memory_size=10)),
}


def make(name: str, hyper: Hyper, *, annealed: bool = False) -> optax.GradientTransformationExtraArgs:
    """The optimizer of that name at scalars "alpha" and, for Adam, "b1" and "b2"; with alpha / sqrt(t) where `annealed`.

    Optax adds eps = 1e-8 inside the root in RMSProp and AdaGrad, so that their least divisor is 1e-4 where Adam's is 1e-8.

    AdaGrad anneals as 1 / sqrt(t) by itself, dividing by the root of a sum of squares; "adagrad_constant" leaves it at that
    where the others take alpha / sqrt(t).

    Example:
        >>> tx = make("adam", {"alpha": jnp.float32(0.5)}, annealed=True)
        >>> print(tx.update(jnp.ones(1), tx.init(jnp.zeros(1)))[0])
        [-0.5]
    """
    method = METHODS[name]
    alpha = hyper.get("alpha", 1.0)
    rate = adam_jax.inverse_sqrt_decay(alpha) if annealed and not method.anneals_itself else alpha
    return optax.with_extra_args_support(method.build(rate, hyper))


def _adagrad(rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    return optax.adagrad(rate, initial_accumulator_value=0.0, eps=1e-8)  # Optax begins the sum at 0.1, the method at 0

"""The default settings of Adam elsewhere."""

from typing import Any, Literal, get_args

from adam_jax import checks

__all__ = ["adam_defaults"]

Framework = Literal["tensorflow", "keras", "blocks", "lasagne", "caffe", "mxnet", "torch"]

# ε̂ stands in eps_hat: all but PyTorch fold the bias correction into the step size, as Section 2 does, and so add ε to the
# uncorrected root.
_DEFAULTS = {"learning_rate": 1e-3, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "eps_hat": True}
_OWN: dict[str, Any] = {"keras": {"eps": 1e-7}, "blocks": {"learning_rate": 2e-3}, "torch": {"eps_hat": False}}


def adam_defaults(framework: Framework) -> dict[str, Any]:
    """A framework's default settings of Adam, with its placement of epsilon.

    Args:
        framework: "tensorflow" (`tf.train.AdamOptimizer`), "keras" (Keras 3), "blocks", "lasagne", "caffe", "mxnet" or
            "torch" (PyTorch; Lua Torch had the same numbers, with epsilon on the uncorrected root).

    Returns:
        Keyword arguments for `adam`: learning_rate, b1, b2, eps, eps_hat. A new dict at each call.

    Raises:
        ValueError: for a framework that is not listed.

    Example:
        >>> adam_defaults("keras")
        {'learning_rate': 0.001, 'b1': 0.9, 'b2': 0.999, 'eps': 1e-07, 'eps_hat': True}
    """
    checks.one_of("framework", framework, get_args(Framework))
    return _DEFAULTS | _OWN.get(framework, {})

"""The models that the paper trains (Section 6), each a function that draws parameters and one that gives the training cost.

A cost takes raw features, unsigned bytes straight from the data, and a key for its noise: dropout, or the sampling of a
variational auto-encoder. All costs are means over the minibatch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

__all__ = ["Problem", "autoencoder", "convolutional", "logistic", "perceptron"]

Params = Any


@dataclass(frozen=True)
class Problem:
    """What is minimised."""

    init: Callable[[jax.Array], Params]  # from a PRNG key to parameters
    # from parameters, features [b, ...], labels [b] and a PRNG key to the mean cost, a scalar
    cost: Callable[[Params, jax.Array, jax.Array, jax.Array], jax.Array]
    settings: dict[str, Any]  # what was chosen, for the record
    # whether a step may stand inside a compiled loop and under vmap. Convolutions may not: in a loop XLA on CPU does not
    # bring their derivatives into the form that it has fast code for (measured on jax 0.10.2: 36 s against 0.7 s a step
    # of 128 images)
    loops: bool = True


def logistic(inputs: int, classes: int, *, l2: float = 1e-4, noise: float = 0.0, scale: float = 1 / 255) -> Problem:
    """L2-regularised multi-class logistic regression (Section 6.1), from zero weights.

    Args:
        inputs: number of features.
        classes: number of labels.
        l2: the cost holds l2 / 2 times the squared norm of the weights.
        noise: probability with which a feature is dropped; the others are scaled up (Section 6.1 takes .5 on IMDB).
        scale: what the raw features are multiplied by.

    Example:
        >>> problem = logistic(4, 10)
        >>> x, y = jnp.zeros((2, 4), jnp.uint8), jnp.zeros(2, jnp.int32)
        >>> print(problem.cost(problem.init(jax.random.key(0)), x, y, jax.random.key(1)))
        2.3025851
    """

    def init(key: jax.Array) -> Params:
        del key
        return {"w": jnp.zeros((inputs, classes)), "b": jnp.zeros(classes)}

    def cost(params: Params, x: jax.Array, y: jax.Array, key: jax.Array) -> jax.Array:
        features = _dropped(key, noise, _flat(x, scale))
        return _cross_entropy(features @ params["w"] + params["b"], y) + _penalty(l2, [params["w"]])

    return Problem(init, cost, {"model": "logistic regression", "l2": l2, "noise": noise, "scale": scale})


def perceptron(
    inputs: int, classes: int, *, hidden: int = 1000, l2: float = 0.0, noise: float = 0.5, input_noise: float = 0.2
) -> Problem:
    """A net with two hidden layers of rectified units (Section 6.2).

    Dropout is `noise` of hidden units and `input_noise` of features, both 0 for the deterministic cost of Figure 2b, which
    has weight decay `l2`, as in `logistic`. Features are scaled from bytes to [0, 1].

    Example:
        >>> params = jax.eval_shape(perceptron(784, 10).init, jax.random.key(0))
        >>> [w.shape for w, _ in params]
        [(784, 1000), (1000, 1000), (1000, 10)]
    """
    sizes = [inputs, hidden, hidden, classes]

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key, 3)
        return [_dense(*layer) for layer in zip(keys, sizes[:-1], sizes[1:], strict=True)]

    def cost(params: Params, x: jax.Array, y: jax.Array, key: jax.Array) -> jax.Array:
        keys = jax.random.split(key, 3)
        h = _dropped(keys[0], input_noise, _flat(x, 1 / 255))
        for (w, b), key_h in zip(params[:-1], keys[1:], strict=True):
            h = _dropped(key_h, noise, jax.nn.relu(h @ w + b))
        w, b = params[-1]
        return _cross_entropy(h @ w + b, y) + _penalty(l2, [w for w, _ in params])

    settings = {"model": f"{inputs}-{hidden}-{hidden}-{classes} ReLU", "l2": l2, "noise": noise, "input_noise": input_noise}
    return Problem(init, cost, settings)


def convolutional(
    size: int,
    classes: int,
    *,
    widths: tuple[int, int, int, int] = (64, 64, 128, 1000),
    noise: float = 0.5,
    input_noise: float = 0.2,
) -> Problem:
    """The convolutional net of Section 6.3: c64-c64-c128-1000, 5 x 5 filters, 3 x 3 max-pooling with stride 2.

    Images have height and width `size`, a multiple of 8, and three channels, already whitened (float32). `widths` are
    filters of the three stages and units of the fully connected layer; dropout is `noise` of that layer, `input_noise` of
    the input.

    Example:
        >>> params = jax.eval_shape(convolutional(32, 10).init, jax.random.key(0))
        >>> sum(leaf.size for leaf in jax.tree.leaves(params))
        2371266
    """
    channels = [3, *widths[:3]]
    flat = widths[2] * (size // 8) ** 2

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key, 5)
        filters = [
            (jax.random.normal(k, (5, 5, i, o)) * (2 / (25 * i)) ** 0.5, jnp.zeros(o))
            for k, i, o in zip(keys[:3], channels[:-1], channels[1:], strict=True)
        ]
        return {"filters": filters, "dense": [_dense(keys[3], flat, widths[3]), _dense(keys[4], widths[3], classes)]}

    def cost(params: Params, x: jax.Array, y: jax.Array, key: jax.Array) -> jax.Array:
        keys = jax.random.split(key, 2)
        h = _dropped(keys[0], input_noise, x)
        for w, b in params["filters"]:
            h = jax.lax.conv_general_dilated(h, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            h = _pooled(jax.nn.relu(h + b))
        (w, b), (w_out, b_out) = params["dense"]
        h = _dropped(keys[1], noise, jax.nn.relu(h.reshape(len(h), -1) @ w + b))
        return _cross_entropy(h @ w_out + b_out, y)

    model = "-".join(f"c{w}" for w in widths[:3]) + f"-{widths[3]}"
    return Problem(init, cost, {"model": model, "noise": noise, "input_noise": input_noise}, loops=False)


def autoencoder(inputs: int, *, hidden: int = 500, latent: int = 50) -> Problem:
    """The variational auto-encoder of Section 6.4: one hidden layer of softplus units each way, spherical Gaussian latents.

    The cost is the negative lower bound on the log-likelihood in nats an image, with pixels in [0, 1] as probabilities.

    Labels are not used.

    Example:
        >>> sorted(jax.eval_shape(autoencoder(784).init, jax.random.key(0)))
        ['decode', 'encode', 'moments', 'pixels']
    """

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key, 4)
        return {
            "encode": _dense(keys[0], inputs, hidden),
            "moments": _dense(keys[1], hidden, 2 * latent, gain=0.1),
            "decode": _dense(keys[2], latent, hidden),
            "pixels": _dense(keys[3], hidden, inputs, gain=0.1),
        }

    def cost(params: Params, x: jax.Array, y: jax.Array, key: jax.Array) -> jax.Array:
        del y
        target = _flat(x, 1 / 255)
        h = jax.nn.softplus(_affine(params["encode"], target))
        mean, log_variance = jnp.split(_affine(params["moments"], h), 2, axis=-1)
        z = mean + jnp.exp(log_variance / 2) * jax.random.normal(key, mean.shape)
        logits = _affine(params["pixels"], jax.nn.softplus(_affine(params["decode"], z)))
        likelihood = -optax.sigmoid_binary_cross_entropy(logits, target).sum(-1)
        divergence = 0.5 * (jnp.exp(log_variance) + mean**2 - 1 - log_variance).sum(-1)
        return (divergence - likelihood).mean()

    return Problem(init, cost, {"model": f"VAE {inputs}-{hidden}-{latent}, softplus"})


def _pooled(h: jax.Array) -> jax.Array:
    """Max-pooling of even height and width, 3 x 3 with stride 2; XLA on CPU is slow at the derivative of `reduce_window`."""
    for axis in (1, 2):
        pairs = h.reshape(*h.shape[:axis], h.shape[axis] // 2, 2, *h.shape[axis + 1 :])
        first, second = (jax.lax.index_in_dim(pairs, k, axis + 1, keepdims=False) for k in range(2))
        shift = [(-1, 1, 0) if d == axis else (0, 0, 0) for d in range(4)]
        h = jnp.maximum(jnp.maximum(first, second), jax.lax.pad(first, -jnp.inf, shift))
    return h


def _flat(x: jax.Array, scale: float) -> jax.Array:
    return x.reshape(len(x), -1).astype(jnp.float32) * scale


def _affine(layer: tuple[jax.Array, jax.Array], x: jax.Array) -> jax.Array:
    w, b = layer
    return x @ w + b


def _dense(key: jax.Array, inputs: int, outputs: int, gain: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """Weights of He's variance and zero biases."""
    return gain * jax.random.normal(key, (inputs, outputs)) * (2 / inputs) ** 0.5, jnp.zeros(outputs)


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _penalty(l2: float, weights: list[jax.Array]) -> jax.Array | float:
    return 0.5 * l2 * sum(jnp.sum(w * w) for w in weights) if l2 else 0.0


def _dropped(key: jax.Array, noise: float, x: jax.Array) -> jax.Array:
    """Inverted dropout with one random byte an entry: the probability of keeping is rounded to a 256th, and used as such."""
    if not noise:
        return x
    keep = round((1 - noise) * 256)
    words = jax.random.bits(key, (-(-x.size // 4),), jnp.uint32)
    kept = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(-1)[: x.size].reshape(x.shape) < keep
    return jnp.where(kept, x * (256 / keep), 0.0)

"""Moving in from Optax, PyTorch and Keras: their default settings, and their states, both ways where both exist."""

from adam_jax.interop.defaults import adam_defaults
from adam_jax.interop.keras_states import from_keras
from adam_jax.interop.optax_states import from_optax, to_optax
from adam_jax.interop.torch_states import from_torch, to_torch

__all__ = ["adam_defaults", "from_keras", "from_optax", "from_torch", "to_optax", "to_torch"]

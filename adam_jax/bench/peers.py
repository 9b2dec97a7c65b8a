"""Published optimizers that are compared where they are installed: `pip install "adam_jax[storage-peers]"`."""

import contextlib
import importlib
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

__all__ = ["NARROWER", "TORCH", "Peer", "flash_adam", "quietly", "torch_device", "torch_state_bytes", "why_missing"]


class Peer(NamedTuple):
    """An optimizer of PyTorch.

    Attributes:
        name: for tables.
        module: where it is.
        build: from that module, parameters and a learning rate to the optimizer.
        limit: bytes a parameter that a step reads and writes at least.
    """

    name: str
    module: str
    build: Callable[[Any, Any, float], Any]
    limit: int

    def __call__(self, params: Any, rate: float) -> Any:
        """The optimizer of those parameters."""
        return self.build(importlib.import_module(self.module), params, rate)


TORCH = (
    Peer("PyTorch fused", "torch.optim", lambda m, params, rate: m.Adam(params, rate, fused=True), 28),
    Peer("torchao Adam8bit", "torchao.optim", lambda m, params, rate: m.Adam8bit(params, rate), 16),
    Peer("bitsandbytes Adam8bit", "bitsandbytes.optim", lambda m, params, rate: m.Adam8bit(params, rate), 16),
)
NARROWER = (
    Peer("torchao AdamFp8", "torchao.optim", lambda m, params, rate: m.AdamFp8(params, rate), 16),
    Peer("torchao Adam4bit", "torchao.optim", lambda m, params, rate: m.Adam4bit(params, rate), 14),
)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without what PyTorch and its packages say, when they start, of their parts that are for other machines."""
    for name in ("torch", "torchao", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def flash_adam(rate: float, bits: int | None) -> Any:
    """flashoptim-jax's Adam, in its own kernel on GPU; `bits` of bfloat16 weights with their residual, or None."""
    module = importlib.import_module("flashoptim_jax")
    return module.flash_adam(rate, fused=jax.default_backend() == "gpu", master_weight_bits=bits)


def torch_device() -> str:
    """PyTorch's name of the kind of device that JAX runs on."""
    torch = importlib.import_module("torch")
    platform = jax.default_backend()
    if platform == "gpu" and torch.cuda.is_available():
        return "cuda"
    if platform != "cpu":
        raise RuntimeError(f"this PyTorch does not run on a {platform}")
    return "cpu"


def torch_state_bytes(optimizer: Any) -> int:
    """Size of an optimizer's state, the parts of quantised tensors included."""
    torch = importlib.import_module("torch")
    tensors = [x for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
    parts = [
        part for x in tensors for part in ([getattr(x, n) for n in x.tensor_attrs] if hasattr(x, "tensor_attrs") else [x])
    ]
    return sum(part.numel() * part.element_size() for part in parts)


def why_missing(error: Exception) -> str:
    """What to say of an optimizer that cannot be compared here."""
    if isinstance(error, ImportError):
        return 'not installed: pip install "adam_jax[storage-peers]"'
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:90]}"

"""Adam and its family as Optax gradient transformations, exact in every dtype.

The paper is "Adam: A Method for Stochastic Optimization", Kingma & Ba, arXiv 1412.6980.

The map, from the arithmetic up:

* `moments`: the paper's arithmetic on one array. `clock`: how much an average weighs (Section 3).
* `norms`: what divides the step. `storage`, `codes`, `rounding`: how the moments of a leaf are kept between steps.
* `transforms`: the step, once, over pytrees; `family`: its members; `optimizers`: chains of them, with Optax's signatures.
* `scaling`, `averaging`, `faults`, `low_precision`: what stands around it in a chain. `checks`, `trees`: what is said when
  settings and trees are wrong.
* Imported when they are first asked for: `tables`, embedding tables at the cost of the rows touched; `watch`, what Adam is
  doing, read from its state; `surgery`, moments read and written; `shardings`, where a state lives; `checkpoints`, what a
  saved state means; `interop`, states of other frameworks; `online`, the game of Section 4.
* `paper`, `bench`: the paper's experiments and comparisons, on the command line; never imported from here.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from adam_jax import ctrl_c as ctrl_c
from adam_jax.averaging import AverageParamsState, average_params, averaged_params
from adam_jax.choices import state_bytes
from adam_jax.family import scale_by_adam, scale_by_adamax, scale_by_amsgrad, scale_by_lp
from adam_jax.faults import SkipNonfiniteState, raise_if_stuck, skip_nonfinite
from adam_jax.low_precision import InFloat32State, in_float32, master_params, set_master_params
from adam_jax.optimizers import adam, adamax, adamaxw, adamw, amsgrad, nadam, nadamw
from adam_jax.scaling import (
    ScaleByBiasCorrectionState,
    add_decayed_weights,
    clip_by_global_norm,
    inverse_sqrt_decay,
    scale_by_bias_correction,
    scale_by_learning_rate,
)
from adam_jax.storage import Storage
from adam_jax.transforms import ScaleByAdamState, ScaleByAmsgradState, scale_by_norm
from adam_jax.trees import label_by_path

if TYPE_CHECKING:
    from adam_jax import checkpoints as checkpoints
    from adam_jax import interop as interop
    from adam_jax import online as online
    from adam_jax import shardings as shardings
    from adam_jax import surgery as surgery
    from adam_jax import tables as tables
    from adam_jax import watch as watch

__version__ = "0.1.0"
__all__ = [
    "AverageParamsState",
    "InFloat32State",
    "ScaleByAdamState",
    "ScaleByAmsgradState",
    "ScaleByBiasCorrectionState",
    "SkipNonfiniteState",
    "Storage",
    "adam",
    "adamax",
    "adamaxw",
    "adamw",
    "add_decayed_weights",
    "amsgrad",
    "average_params",
    "averaged_params",
    "clip_by_global_norm",
    "in_float32",
    "inverse_sqrt_decay",
    "label_by_path",
    "master_params",
    "nadam",
    "nadamw",
    "raise_if_stuck",
    "scale_by_adam",
    "scale_by_adamax",
    "scale_by_amsgrad",
    "scale_by_bias_correction",
    "scale_by_learning_rate",
    "scale_by_lp",
    "scale_by_norm",
    "set_master_params",
    "skip_nonfinite",
    "state_bytes",
]

# imported when they are first asked for
_LATER = ("checkpoints", "interop", "online", "shardings", "surgery", "tables", "watch")


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return importlib.import_module(f"adam_jax.{name}")
    raise AttributeError(f"module 'adam_jax' has no attribute {name!r}", name=name, obj=sys.modules[__name__])


def __dir__() -> list[str]:
    return sorted([*__all__, *_LATER, "__version__"])

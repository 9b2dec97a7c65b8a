"""Adam and its family as Optax gradient transformations, exact in every dtype.

The paper is "Adam: A Method for Stochastic Optimization", Kingma & Ba, arXiv 1412.6980.

The map, from the arithmetic up:

* `moments`: the paper's arithmetic on one array.
* `rounding`: one array in fewer bits, without bias or without loss.
* `storage`, `codes`: how moments are kept between steps: bfloat16, int8, or a way of your own.
* `checks`, `trees`: settings and trees, and what is said when they are wrong.
* `transforms`: the family, `init`/`update` pairs over pytrees.
* `scaling`, `averaging`, `faults`: what stands around it in a chain.
* `low_precision`: bfloat16 and float16 weights that still learn.
* `leafsums`, `diagnostics`, `recorder`: what Adam is doing, read from its state, in files and in pictures.
* `domains`, `regret`: the online game of Section 4, and where Adam fails.
* `skipped`, `rows`: tables of which each step touches a few rows.
* `optimizers`: chains of those, with Optax's signatures.
* `interop`: other frameworks' settings.
* `paper`, `bench`, `__main__`: the paper's experiments and comparisons, on the command line; never imported from here.
"""

from adam_jax.averaging import AverageParamsState, average_params, averaged_params
from adam_jax.diagnostics import Diagnostics, Measurements, watch_adam
from adam_jax.domains import Ball, Box
from adam_jax.faults import SkipNonfiniteState, raise_if_stuck, skip_nonfinite
from adam_jax.interop import adam_defaults
from adam_jax.low_precision import InFloat32State, in_float32, master_params, set_master_params
from adam_jax.optimizers import adam, adamax, adamaxw, adamw, amsgrad, nadam, nadamw
from adam_jax.recorder import Recorder, plot_history
from adam_jax.regret import (
    BestPoint,
    Game,
    RegretBound,
    best_fixed_point,
    play,
    theorem_4_1_bound,
    theorem_4_1_settings,
)
from adam_jax.rows import RowAdam, RowAdamState, row_adam
from adam_jax.scaling import (
    ScaleByBiasCorrectionState,
    add_decayed_weights,
    clip_by_global_norm,
    inverse_sqrt_decay,
    scale_by_bias_correction,
    scale_by_learning_rate,
)
from adam_jax.storage import Storage, state_bytes
from adam_jax.transforms import (
    ScaleByAdamState,
    ScaleByAmsgradState,
    scale_by_adam,
    scale_by_adamax,
    scale_by_amsgrad,
    scale_by_lp,
)
from adam_jax.trees import label_by_path

__all__ = [
    "AverageParamsState",
    "Ball",
    "BestPoint",
    "Box",
    "Diagnostics",
    "Game",
    "InFloat32State",
    "Measurements",
    "Recorder",
    "RegretBound",
    "RowAdam",
    "RowAdamState",
    "ScaleByAdamState",
    "ScaleByAmsgradState",
    "ScaleByBiasCorrectionState",
    "SkipNonfiniteState",
    "Storage",
    "adam",
    "adam_defaults",
    "adamax",
    "adamaxw",
    "adamw",
    "add_decayed_weights",
    "amsgrad",
    "average_params",
    "averaged_params",
    "best_fixed_point",
    "clip_by_global_norm",
    "in_float32",
    "inverse_sqrt_decay",
    "label_by_path",
    "master_params",
    "nadam",
    "nadamw",
    "play",
    "plot_history",
    "raise_if_stuck",
    "row_adam",
    "scale_by_adam",
    "scale_by_adamax",
    "scale_by_amsgrad",
    "scale_by_bias_correction",
    "scale_by_learning_rate",
    "scale_by_lp",
    "set_master_params",
    "skip_nonfinite",
    "state_bytes",
    "theorem_4_1_bound",
    "theorem_4_1_settings",
    "watch_adam",
]

"""What Adam is doing, read from its state: numbers, a table, files and pictures.

`watch_adam` reads a state; `Recorder` and `plot_history` show what it read and need `pip install "adam_jax[watch]"`.
"""

from adam_jax.watch.diagnostics import SNR_LEVELS, Diagnostics, Leaves, Measurements, watch_adam
from adam_jax.watch.pictures import plot_history
from adam_jax.watch.recorder import Recorder, record
from adam_jax.watch.sums import SNR_EDGES

__all__ = [
    "SNR_EDGES",
    "SNR_LEVELS",
    "Diagnostics",
    "Leaves",
    "Measurements",
    "Recorder",
    "plot_history",
    "record",
    "watch_adam",
]

"""Embedding tables, trained at the cost of the rows that a step touches.

`rows`: the optimizer. `catching_up`: what dense Adam does to rows while their gradient is zero. `keeping`: rows in and out
of a table, rounded or sharded. `surgery`: tables that begin anew, grow and shrink.
"""

from adam_jax.tables.keeping import RowAdamState
from adam_jax.tables.rows import RowAdam, row_adam
from adam_jax.tables.surgery import drop, grow, master_table, restart

__all__ = ["RowAdam", "RowAdamState", "drop", "grow", "master_table", "restart", "row_adam"]

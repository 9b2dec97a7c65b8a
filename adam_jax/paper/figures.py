"""The registry of figures, by name. An experiment and its entry stand in one file."""

from adam_jax.paper import figure1, figure2, figure3, figure4, regret
from adam_jax.paper.lab import Figure

__all__ = ["FIGURES"]

_ALL = (figure1.FIG1A, figure1.FIG1B, figure2.FIG2A, figure2.FIG2B, figure3.FIG3, figure4.FIG4, regret.REGRET)
FIGURES: dict[str, Figure] = {figure.name: figure for figure in _ALL}

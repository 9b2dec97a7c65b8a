"""Section 4: a game of convex losses, its regret, Theorem 4.1's bound, and where Adam fails."""

from adam_jax.online.best import BestPoint, best_fixed_point
from adam_jax.online.domains import Ball, Box
from adam_jax.online.game import Game, linear_losses, play, reddi_losses, regret
from adam_jax.online.theorem import RegretBound, theorem_4_1_bound, theorem_4_1_settings

__all__ = [
    "Ball",
    "BestPoint",
    "Box",
    "Game",
    "RegretBound",
    "best_fixed_point",
    "linear_losses",
    "play",
    "reddi_losses",
    "regret",
    "theorem_4_1_bound",
    "theorem_4_1_settings",
]

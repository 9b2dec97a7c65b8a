"""Norms: the size of recent gradients, which divides the step. Arithmetic on one array; nothing here knows of storage.

A norm advances what the state keeps of it (`nus`, one array or two) and reads from that the size that divides the step. Its
numbers may be traced; what it is (its class) may not. A new norm is a class here, a line of the oracle and a row of cases.

A step takes every norm from s to s' >= kept * s and s' >= new * |g| (`shares`). By Hölder, with 1/p + 1/q = 1, that bounds
the step of an average m with |m| <= C s before it: |m'| <= C' s', C'^q = ((1 - a) C / kept)^q + (a / new)^q, where a is how
far m moves. Nothing else of the past enters, so it holds for every history of gradients and of decays. Its fixed point at
constant decays is the supremum over all histories of gradients: for Adam, by Cauchy-Schwarz, (1 - b1) / sqrt((1 - b2)
(1 - b1^2 / b2)), which is 7.27 at the defaults and infinite for b1^2 >= b2.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from adam_jax import clock, moments
from adam_jax.clock import Tick

__all__ = [
    "CorrectedRoots",
    "CorrectedSquares",
    "Infinity",
    "Largest",
    "Maxima",
    "Norm",
    "Power",
    "Powers",
    "Root",
    "Roots",
    "Square",
    "Squares",
]

UNBOUNDED = 1e30  # where bounds stop growing, so that they stay numbers and come down when the decays do
Nus = tuple[jax.Array, ...]


class Squares(NamedTuple):
    """A state's `form`: `nu` is v. `codes` is the marker of a narrow storage, () where all leaves are exact."""

    codes: Any = ()


class Roots(NamedTuple):
    """A state's `form`: `nu` is sqrt(v)."""

    codes: Any = ()


class CorrectedSquares(Squares):
    """`Squares` of AMSGrad, where `nu_max` is the largest `nu` as it is kept, and not the largest raw one."""


class CorrectedRoots(Roots):
    """`Roots` of AMSGrad, likewise."""


class Maxima(NamedTuple):
    """A state's `form`: `nu` is AdaMax's u."""

    codes: Any = ()


class Powers(NamedTuple):
    """A state's `form`: `nu` is v^(1/p)."""

    codes: Any = ()


class Norm:
    """What norms share; the defaults are those of a norm that keeps one array, the size itself, bias-corrected.

    A step traces the methods with jit disabled, which unrolls loops in them.

    Attributes:
        form: the marker of a state that keeps this norm.
        slots: how many arrays are kept.
        squares: 1 where gradients are squared as they are, and so must saturate; else 0 (`moments.saturate`).
        exponent: the p of the norm.
        corrected: whether Section 3's correction applies.

    Example:
        >>> from adam_jax import scale_by_norm
        >>> steps = [scale_by_norm(norm) for norm in (Square(), Root(), Infinity(), Power(3.0), Largest(Square()))]
        >>> print(*(tx.update(jnp.array([-5.0]), tx.init(jnp.zeros(1)))[0] for tx in steps))
        [-1.] [-1.] [-1.] [-1.] [-1.]
    """

    slots: int = 1

    @property
    def form(self) -> type:
        return Roots

    @property
    def squares(self) -> int:
        return 0

    @property
    def exponent(self) -> ArrayLike:
        return 2.0

    @property
    def corrected(self) -> bool:
        return True

    def rooted(self, *, coarse: bool = False) -> "Norm":
        """The same norm, of which the size itself is kept; `coarse` where that is going to be rounded to few bits."""
        del coarse
        return self

    def rate(self, b2_rate: ArrayLike) -> ArrayLike:
        """The weight of one more gradient in the average, from 1 - b2."""
        return b2_rate

    def tick(self, b2_rate: ArrayLike, weight: ArrayLike, count: ArrayLike, *, corrected: bool = True) -> Tick:
        """The clock of the average; `rate` is 1 - b2 as it was given."""
        tick = clock.tick(self.rate(b2_rate), weight, count, corrected=corrected and self.corrected)
        return tick._replace(rate=jnp.asarray(b2_rate, jnp.result_type(tick.weight)))

    def full(self, b2_rate: ArrayLike) -> Tick:
        """The clock's step long after the first, when correction no longer matters."""
        one = jnp.ones([])
        return Tick(jnp.asarray(b2_rate), one, jnp.asarray(self.rate(b2_rate)), one)

    def average(self, m: jax.Array, g: jax.Array, moved: ArrayLike) -> jax.Array:
        """The first moment after one more gradient; m may be as small as this norm can be."""
        return moments.small_average(m, g, moved)

    def advance(self, nus: Nus, g: jax.Array, t: Tick) -> Nus:
        """What is kept after one more gradient."""
        raise NotImplementedError

    def size(self, nus: Nus, t: Tick) -> jax.Array:
        """What the first moment is divided by, before eps."""
        del t
        return nus[0]

    def size_scale(self, weight: ArrayLike) -> ArrayLike:
        """How many times larger the size of weight * v is than that of v."""
        return jnp.sqrt(weight)

    def scale(self, weight: ArrayLike) -> ArrayLike:
        """The same of what is kept."""
        return self.size_scale(weight)

    def shares(self, t: Tick) -> tuple[ArrayLike, ArrayLike]:
        """The least that one step leaves of the size, and the least that it makes of |g|: `kept` and `new` above."""
        power = 1.0 / self.exponent
        return (1.0 - t.moved) ** power, t.moved**power

    def most_of_gradient(self, t: Tick) -> jax.Array:
        """The most that |g| / s can be after a step: no bound, `UNBOUNDED`, where the norm does not move."""
        new = jnp.asarray(self.shares(t)[1])
        return jnp.where(new > 0, clock.corrected_rate(1.0, new), UNBOUNDED)

    def next_ratio(self, ratio: ArrayLike, moved: ArrayLike, t: Tick) -> jax.Array:
        """The most that |m| / s can be after a step, C' above, from the most that it was; m moves by `moved`."""
        kept, _ = self.shares(t)
        old = jnp.minimum((1.0 - moved) * ratio / jnp.maximum(kept, 1e-30), UNBOUNDED)  # kept is zero at b2 = 0
        fresh, q = moved * self.most_of_gradient(t), _conjugate(self.exponent)
        larger = jnp.maximum(jnp.maximum(old, fresh), 1e-30)
        return larger * ((old / larger) ** q + (fresh / larger) ** q) ** (1.0 / q)

    def largest_ratio(self, b1_rate: ArrayLike, b2_rate: ArrayLike) -> jax.Array:
        """The most that |m| / s can be at constant decays: the fixed point of `next_ratio`, infinite where there is none."""
        kept, new = self.shares(self.full(b2_rate))
        q = _conjugate(self.exponent)
        ratio = (1.0 - b1_rate) / jnp.maximum(kept, 1e-30)
        bounded = (ratio < 1.0) & (jnp.asarray(new) > 0)
        room = -jnp.expm1(q * jnp.log(jnp.where(bounded, jnp.maximum(ratio, 1e-30), 0.5)))
        return jnp.where(bounded, b1_rate * clock.corrected_rate(1.0, new) / room ** (1.0 / q), jnp.inf)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Root(Norm):
    """sqrt(v + eps_root), of which sqrt(v) is kept (Algorithm 1): exact from 1e-36 to 1e37."""

    eps_root: ArrayLike | None = None
    coarse: bool = dataclasses.field(default=False, metadata={"static": True})

    def rooted(self, *, coarse: bool = False) -> Norm:
        return Root(self.eps_root, coarse)

    def average(self, m: jax.Array, g: jax.Array, moved: ArrayLike) -> jax.Array:
        return (moments.average if self.coarse else moments.small_average)(m, g, moved)

    def advance(self, nus: Nus, g: jax.Array, t: Tick) -> Nus:
        return (moments.root_second_moment(nus[0], g, t.moved, coarse=self.coarse),)

    def size(self, nus: Nus, t: Tick) -> jax.Array:
        del t
        return nus[0] if self.eps_root is None else moments.root_plus(nus[0], self.eps_root)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Square(Norm):
    """sqrt(v + eps_root), of which v is kept, Optax's nu (Algorithm 1)."""

    eps_root: ArrayLike | None = None

    @property
    def form(self) -> type:
        return Squares

    @property
    def squares(self) -> int:
        return 1

    def rooted(self, *, coarse: bool = False) -> Norm:
        return Root(self.eps_root, coarse)

    def average(self, m: jax.Array, g: jax.Array, moved: ArrayLike) -> jax.Array:
        return moments.average(m, g, moved)

    def advance(self, nus: Nus, g: jax.Array, t: Tick) -> Nus:
        return (moments.second_moment(nus[0], g, t.moved),)

    def size(self, nus: Nus, t: Tick) -> jax.Array:
        del t
        return moments.root(nus[0] if self.eps_root is None else nus[0] + self.eps_root)

    def scale(self, weight: ArrayLike) -> ArrayLike:
        return weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Infinity(Norm):
    """u = max(b2 u, |g| + eps) (Algorithm 2), which needs no correction: one gradient may move it all the way."""

    eps: ArrayLike = 0.0

    @property
    def form(self) -> type:
        return Maxima

    @property
    def exponent(self) -> ArrayLike:
        return jnp.inf

    @property
    def corrected(self) -> bool:
        return False

    def rate(self, b2_rate: ArrayLike) -> ArrayLike:
        return jnp.ones_like(b2_rate)

    def advance(self, nus: Nus, g: jax.Array, t: Tick) -> Nus:
        return (moments.infinity_moment(nus[0], g, t.rate, self.eps),)

    def size_scale(self, weight: ArrayLike) -> ArrayLike:
        return jnp.ones_like(weight)

    def shares(self, t: Tick) -> tuple[ArrayLike, ArrayLike]:
        return 1.0 - t.rate, jnp.ones_like(t.rate)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Power(Norm):
    """v^(1/p), the L^p norm, which is kept itself (eq. 6-7): the average of |g|^p decays by b2^p."""

    p: ArrayLike

    @property
    def form(self) -> type:
        return Powers

    @property
    def exponent(self) -> ArrayLike:
        return self.p

    def rate(self, b2_rate: ArrayLike) -> ArrayLike:
        return -jnp.expm1(self.p * jnp.log1p(-jnp.asarray(b2_rate)))

    def advance(self, nus: Nus, g: jax.Array, t: Tick) -> Nus:
        log_keep = self.p * jnp.log1p(-jnp.asarray(t.rate)) + jnp.log(t.kept)
        return (moments.lp_moment(nus[0], g, self.p, t.moved, log_keep),)

    def size_scale(self, weight: ArrayLike) -> ArrayLike:
        return weight ** (1.0 / self.p)

    def shares(self, t: Tick) -> tuple[ArrayLike, ArrayLike]:  # by b2 itself: 1 - moved is zero where p is large
        return (1.0 - jnp.asarray(t.rate)) * t.kept ** (1.0 / self.p), t.moved ** (1.0 / self.p)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Largest(Norm):
    """The largest of another norm so far (AMSGrad, Reddi et al. 2018): of the raw one, or of it as it is kept."""

    of: Norm
    raw: bool = dataclasses.field(default=True, metadata={"static": True})

    slots = 2

    @property
    def form(self) -> type:
        form = self.of.form
        return form if self.raw else {Squares: CorrectedSquares, Roots: CorrectedRoots}.get(form, form)

    @property
    def squares(self) -> int:
        return self.of.squares

    @property
    def exponent(self) -> ArrayLike:
        return self.of.exponent

    @property
    def corrected(self) -> bool:
        return self.of.corrected

    def rooted(self, *, coarse: bool = False) -> Norm:
        return Largest(self.of.rooted(coarse=coarse), self.raw)

    def rate(self, b2_rate: ArrayLike) -> ArrayLike:
        return self.of.rate(b2_rate)

    def average(self, m: jax.Array, g: jax.Array, moved: ArrayLike) -> jax.Array:
        return self.of.average(m, g, moved)

    def advance(self, nus: Nus, g: jax.Array, t: Tick) -> Nus:
        (nu,) = self.of.advance(nus[:1], g, t)
        return nu, jnp.maximum(nus[1], nu * self._of_raw(t))

    def size(self, nus: Nus, t: Tick) -> jax.Array:
        raw = jnp.asarray(self._of_raw(t))
        return self.of.size((moments.quotient(nus[1], jnp.where(raw > 0, raw, 1.0)) if self.raw else nus[1],), t)

    def size_scale(self, weight: ArrayLike) -> ArrayLike:
        return self.of.size_scale(weight)

    def scale(self, weight: ArrayLike) -> ArrayLike:
        return self.of.scale(weight)

    def shares(self, t: Tick) -> tuple[ArrayLike, ArrayLike]:
        return self.of.shares(t)

    def _of_raw(self, t: Tick) -> ArrayLike:
        """The raw moment in units of the kept one."""
        return self.of.scale(t.weight) if self.raw else jnp.ones_like(t.weight)


def _conjugate(p: ArrayLike) -> jax.Array:
    """The q with 1/p + 1/q = 1, as far as a power can use it."""
    return 1.0 / jnp.maximum(1.0 - 1.0 / jnp.asarray(p), 1e-6)

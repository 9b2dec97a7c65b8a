"""The leaves of Adam's state as the step reads them, whatever storage they are in."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adam_jax import choices, codes, norms, storage, trees
from adam_jax.choices import StoragePerLeaf
from adam_jax.storage import Kept, Storage


class WatchedLeaf(NamedTuple):
    """A leaf's moments as they are kept, and how to read them or a part of them."""

    path: str
    kept: Kept
    how: Storage
    bound: jax.Array  # of |m| in units of the size: where rounding passed it, the step did not
    empty: jax.Array  # whether nothing has been averaged yet

    def read(self, kept: Kept) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """The first moment, and what is kept of the second ones, decoded."""
        wide = jnp.complex64 if jnp.iscomplexobj(kept.mu) else jnp.float32
        return self.how.load(self.how.emptied(kept, self.empty), wide, codes.ratios(self.bound), self.bound)


def watched_leaves(node: Any, given: StoragePerLeaf) -> list[WatchedLeaf]:
    """Each trained leaf of a state of the Adam family: one second moment, or AMSGrad's two, of which the last divides."""
    narrow = getattr(node, "codes", ())
    bound, windows = narrow if isinstance(narrow, storage.Codes) else (jnp.asarray(norms.UNBOUNDED), None)
    scales = None if windows is None else codes.scale(windows)
    choice = None if given is None else choices.Choice(given)
    from_optax = isinstance(node, optax.ScaleByAdamState)  # which keeps numbers as they are, in any dtype
    columns = [node.mu, node.nu, *([node.nu_max] if hasattr(node, "nu_max") else [])]
    rows = zip(trees.with_paths(node.mu), *(jax.tree.leaves(column) for column in columns), strict=True)
    found = []
    for (keys, _), mu, *nus in rows:
        if trees.is_absent(mu):
            continue
        at = trees.At(keys, len(found))
        kept = Kept(mu, tuple(nus), () if scales is None else scales[len(found)])
        how = Storage() if from_optax else choices.held_by(at, kept, node.form, given)
        how = choice.old(at, kept) if choice else how
        found.append(WatchedLeaf(at.path, kept, how, bound, jnp.asarray(node.count) <= 0))
    if not found:
        raise ValueError("the Adam in state must have trained at least one leaf, got none")
    return found

"""Walks over heads with heads inside. A head under the name "" takes and gives the values themselves, not a dict."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxheads.contract import AbstractHead, Batch
from jaxheads.numerics import fields
from jaxheads.numerics.linear import LinearLogits

# Equal heads are one program if there are so many of them. Fewer compile in seconds, and run as fast one by one.
LEAST = 16


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Adds the name of the head to a `ValueError` that it raises."""
    try:
        yield
    except ValueError as error:
        if not name:
            raise
        raise ValueError(f"Head {name!r}: {error}") from error


def each(head: AbstractHead, function: Callable[..., Any], *trees: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `function(inner, *values)` by name, for every head inside that all trees hold."""
    found = {}
    for name, inner in head.parts().items():
        if all(name in tree for tree in trees):
            with naming(name):
                found[name] = function(inner, *(tree[name] for tree in trees))
    return found


def parts_of(head: AbstractHead, batch: Batch) -> dict[str, Batch]:
    """Returns the batches of the heads inside, by name, as these heads see them."""
    return head.prepared(batch).parts or {}


def unnested(by_name: Mapping[str, Any]) -> Any:
    """Returns the form for users: a dict by name, or the value of the one head under the name ""."""
    return by_name[""] if "" in by_name else dict(by_name)


def leaves(head: AbstractHead) -> list[AbstractHead]:
    """Returns the heads without heads inside."""
    inside = head.parts()
    return [leaf for inner in inside.values() for leaf in leaves(inner)] if inside else [head]


# Many equal heads as one program.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stack:
    """The values of several equal heads, stacked along a new first axis."""

    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    values: Any

    def by_name(self) -> dict[str, Any]:
        """Returns the values of each head."""
        stacked, structure = jax.tree.flatten(self.values)
        columns = [jax.lax.split(x, (1,) * len(self.names)) for x in stacked]
        rows = ([jax.lax.squeeze(x, (0,)) for x in row] for row in zip(*columns, strict=True))
        return {name: structure.unflatten(row) for name, row in zip(self.names, rows, strict=True)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ByGroup:
    """The values of the heads inside a head: by name; the values of many equal heads are in a `Stack`."""

    apart: dict[str, Any]
    stacks: tuple[Stack, ...]

    def map(self, function: Callable[[Any], Any]) -> "ByGroup":
        """Returns the results of `function`, which takes the value of one head, or stacked values."""
        apart = {name: function(value) for name, value in self.apart.items()}
        return ByGroup(apart, tuple(Stack(stack.names, function(stack.values)) for stack in self.stacks))

    def by_name(self) -> dict[str, Any]:
        """Returns the values of each head."""
        found = dict(self.apart)
        for stack in self.stacks:
            found |= stack.by_name()
        return found


def each_group(
    head: AbstractHead, function: Callable[..., Any], *trees: Mapping[str, Any] | ByGroup, at_once: bool = False
) -> ByGroup:
    """Returns `function(inner, *values)` for every head inside, in compiled code.

    Heads that differ only in their names, with values of equal structure, shapes and dtypes, are a group. `function` is
    traced once for a group, and compiled once: it gets the first head, with the learned values of each in turn.

    Args:
        trees: values by name, of all heads inside; or earlier results, whose groups are kept.
        at_once: whether the heads of a group run together, by `jax.vmap`, instead of one after another. Then hooks with
            branches would run all of them, so it is for functions that call no hook.
    """
    plain = [tree for tree in trees if not isinstance(tree, ByGroup)]
    earlier = [[stack.names for stack in tree.stacks] for tree in trees if isinstance(tree, ByGroup)]
    groups = earlier[0] if earlier else _find_groups(head, plain)
    inside, grouped = head.parts(), {name for names in groups for name in names}
    single = [tree.apart if isinstance(tree, ByGroup) else tree for tree in trees]
    apart = each(head, function, *({n: x for n, x in tree.items() if n not in grouped} for tree in single))
    stacks = []
    for i, names in enumerate(groups):
        heads = _Values.of([inside[name] for name in names])
        values = [
            _Values.stacked(tree.stacks[i].values)
            if isinstance(tree, ByGroup)
            else _Values.of([tree[name] for name in names])
            for tree in trees
        ]
        with naming(names[0]):
            stacks.append(Stack(names, _run_group(function, [heads, *values], len(names), at_once)))
    return ByGroup(apart, tuple(stacks))


@dataclasses.dataclass(frozen=True)
class _Values:
    """The leaves of the values of a group: those that all heads share, and stacked ones."""

    structure: Any
    shared: dict[int, Any]
    own: dict[int, Any]

    @classmethod
    def of(cls, trees: Sequence[Any]) -> "_Values":
        columns = [*zip(*map(jax.tree.leaves, trees), strict=True)]
        shared = {i: column[0] for i, column in enumerate(columns) if all(x is column[0] for x in column)}
        own = {i: _stack(column) for i, column in enumerate(columns) if i not in shared}
        return cls(jax.tree.structure(trees[0]), shared, own)

    @classmethod
    def stacked(cls, tree: Any) -> "_Values":
        leaves, structure = jax.tree.flatten(tree)
        return cls(structure, {}, dict(enumerate(leaves)))

    def tree(self, own: Mapping[int, Any]) -> Any:
        leaves = {**self.shared, **own}
        return self.structure.unflatten([leaves[i] for i in range(len(leaves))])


def _stack(values: Sequence[Any]) -> jax.Array:
    """Stacks as `jnp.stack`, in the operations that take the least time to trace."""
    return jax.lax.concatenate([jax.lax.expand_dims(x, (0,)) for x in values], 0)


def _run_group(function: Callable[..., Any], values: Sequence[_Values], n: int, at_once: bool) -> Any:
    def one(own: Any) -> Any:
        return function(*(each.tree(mine) for each, mine in zip(values, own, strict=True)))

    own = [each.own for each in values]
    if not any(own):  # all heads share all of their values
        return jax.tree.map(lambda x: jnp.broadcast_to(x[None], (n, *jnp.shape(x))), one(own))
    return jax.vmap(one)(own) if at_once else jax.lax.map(one, own)


def _find_groups(head: AbstractHead, trees: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Returns the names of the heads in each group."""
    if len(inside := head.parts()) < LEAST:
        return []
    groups: dict[Any, list[str]] = {}
    for name, inner in inside.items():
        if (kind := _describe_head(inner)) is not None:
            values = [tree[name] for tree in trees]
            leaves, structure = jax.tree.flatten(values, is_leaf=lambda x: isinstance(x, LinearLogits))
            # The hidden layer of lazy logits is too large for a copy of each head's own.
            if not any(isinstance(x, LinearLogits) for x in leaves):
                groups.setdefault((kind, structure, *map(_describe_leaf, leaves)), []).append(name)
    return [tuple(names) for names in groups.values() if len(names) >= LEAST]


def _describe_leaf(x: Any) -> Any:
    # A Python bool is an argument of the function, not data.
    return x if isinstance(x, bool) else jax.typeof(x)


def _describe_head(head: AbstractHead) -> Any:
    """Returns a value that is equal for heads that differ only in their names; None for a head to be left apart."""
    if any(leaf.coupling == "batch" for leaf in leaves(head)) or (plain := _unname(fields.unbound(head))) is None:
        return None
    return plain, *map(_describe_leaf, jax.tree.leaves(head))


def nameless(head: AbstractHead) -> AbstractHead:
    """Returns an unbound head without its name, for results that equal heads share; itself if the name matters."""
    plain = _unname(head)
    return head if plain is None else plain


def _unname(head: Any) -> Any:
    """Returns an unbound head without names; None where a name may matter: as a key, or to a user's class."""
    inside = head.parts()
    # The code of a user's class may read the name, in ways that nobody can see.
    if (inside and "" not in inside) or not type(head).__module__.startswith("jaxheads."):
        return None
    changes = {name: _unname(child) for name, child in fields.children(head).items()}
    if any(child is None for child in changes.values()):
        return None
    return fields.with_values(head, {**changes, "name": None})

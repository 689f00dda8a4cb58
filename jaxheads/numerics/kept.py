"""Values derived from a head: layouts, names, compiled programs. They live as long as a head that is equal to it.

A usual cache would keep the programs of heads that are gone, and all values that their loss functions hold: a search
over a thousand heads would take gigabytes.
"""

import collections
import copy
import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

# The attribute of a head that holds the values derived from it. Copies and pickles leave it out.
KEPT = "_kept"
# The values of so many heads stay when the heads are gone: a head that is made anew for each call finds them again.
RECENT = 32

Result = TypeVar("Result")


class Kept:
    """The values derived from one head, and from all heads that are equal to it.

    Attributes:
        twin: a copy of the head, which never holds the values: not as a key either.
        values: the values, by function and other arguments.
    """

    __slots__ = ("__weakref__", "twin", "values")

    def __init__(self, head: Any):
        self.twin = copy.copy(head)
        object.__setattr__(self.twin, KEPT, None)
        self.values: dict[Any, Any] = {}


_living: weakref.WeakValueDictionary[Any, Kept] = weakref.WeakValueDictionary()
_recent: collections.OrderedDict[Any, Kept] = collections.OrderedDict()
_lock = threading.RLock()


def per_head(derive: Callable[..., Result]) -> Callable[..., Result]:
    """Decorates a function of an unbound head, and of other hashable values: it is called once for equal values."""

    @functools.wraps(derive)
    def find(head: Any, *rest: Any) -> Result:
        values = _find(head).values
        try:
            return values[derive, *rest]
        except KeyError:
            pass
        # Without the lock: this may compile. Two threads may do so at once; both find the same value.
        return values.setdefault((derive, *rest), derive(head, *rest))

    return find


def twin_of(head: Any) -> Any:
    """Returns a head that equals an unbound one, and does not keep programs alive.

    Metrics have it: JAX remembers the structures of arguments and results for ever, and that of metrics holds a head.
    """
    return _find(head).twin


def _find(head: Any) -> Kept:
    if (kept := vars(head).get(KEPT)) is not None:
        return kept
    with _lock:
        if (kept := _living.get(head)) is None:
            kept = Kept(head)
            _living[kept.twin] = kept
        _recent[kept.twin] = kept
        _recent.move_to_end(kept.twin)
        if len(_recent) > RECENT:
            _recent.popitem(last=False)
    if KEPT not in vars(head):
        object.__setattr__(head, KEPT, kept)
    return kept

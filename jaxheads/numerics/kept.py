"""Values derived from a head: layouts, names, compiled programs. They live as long as a head that is equal to it.

A usual cache would keep the programs of heads that are gone, and all values that their loss functions hold: a search
over a thousand heads would take gigabytes.
"""

import collections
import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

# The slots of a head: the values derived from it, and for a bound head the unbound one. Copies and pickles lack them.
KEPT, ORIGIN = "_kept", "_origin"

Result = TypeVar("Result")


class Kept:
    """The values derived from one head, and from all heads that are equal to it.

    Attributes:
        twin: a copy of the head which never holds the values, nor do the heads inside it: it is a key, too.
        values: the values, by function and other arguments.
    """

    __slots__ = ("__weakref__", "twin", "values")

    def __init__(self, twin: Any):
        self.twin = twin
        self.values: dict[Any, Any] = {}


class Store:
    """The values of one kind. A head holds its own; those of the last heads are held here too.

    So a head that is made anew for each call finds them again.

    Args:
        recent: the number of heads whose values stay when the heads are gone.
    """

    def __init__(self, recent: int):
        self.recent = recent
        self._living: weakref.WeakValueDictionary[Any, Kept] = weakref.WeakValueDictionary()
        self._last: collections.OrderedDict[Any, Kept] = collections.OrderedDict()
        self._lock = threading.RLock()

    def __call__(self, derive: Callable[..., Result]) -> Callable[..., Result]:
        """Decorates a function of an unbound head, and of other hashable values: it is called once for equal values."""

        @functools.wraps(derive)
        def find(head: Any, *rest: Any) -> Result:
            values = self.find(head).values
            try:
                return values[derive, *rest]
            except KeyError:
                pass
            # Without the lock: this may compile. Two threads may do so at once; both find the same value.
            return values.setdefault((derive, *rest), derive(head, *rest))

        return find

    def find(self, head: Any) -> Kept:
        """Returns the values of an unbound head."""
        try:
            held = head._kept
        except AttributeError:
            held = {}
            object.__setattr__(head, KEPT, held)
        if held is not None and (kept := held.get(self)) is not None:
            return kept
        with self._lock:
            if (kept := self._living.get(head)) is None:
                kept = Kept(head.make_twin())
                self._living[kept.twin] = kept
            self._last[kept.twin] = kept
            self._last.move_to_end(kept.twin)
            if len(self._last) > self.recent:
                self._last.popitem(last=False)
        if held is not None:
            held[self] = kept
        return kept


# A layout is small. The programs of a head take 3.5 MB.
per_head, programs_per_head = Store(256), Store(64)


def twin_of(head: Any) -> Any:
    """Returns a head that equals an unbound one, and does not keep programs alive.

    Metrics have it: JAX remembers the structures of arguments and results for ever, and that of metrics holds a head.
    """
    return per_head.find(head).twin

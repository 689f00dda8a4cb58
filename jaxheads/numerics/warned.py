"""The warnings of the library: each is a class of its own, so that a user can silence it alone."""


class BadInputWarning(UserWarning):
    """Elements with an illegal label, weight or slice were left out of the metrics; or weights are too small to add."""


class CheckpointWarning(UserWarning):
    """A checkpoint is damaged, and training goes on from an older one, or without the best state so far."""


class GridWarning(UserWarning):
    """The bins of a score histogram leave more than 1e-2 of a metric open."""


class MaskWarning(UserWarning):
    """Weights that are all 0 or 1 look like a mask, and the loss is divided by the number of all elements."""


class RoundingWarning(UserWarning):
    """Labels lose more than a hundredth of their spread when they become float32."""


class StackedWarning(UserWarning):
    """Several states in one were read: a value is an array with an entry for each state, and none for all data."""

"""The metrics that the four outcomes of a yes-or-no decision tell, from their weights."""

import dataclasses
from typing import Any, Literal, TypeAlias

from jaxheads.metrics.base import View
from jaxheads.numerics import brief

# The sum by which a confusion matrix is divided: of each row, of each column, of all; None: it is not divided.
Normalize: TypeAlias = Literal["true", "pred", "all"] | None


def check_normalize(what: str, normalize: Any) -> None:
    """Refuses all but the ways to divide a confusion matrix."""
    if not brief.is_one_of(normalize, (None, "true", "pred", "all")):
        raise ValueError(f'{what}: normalize must be "true", "pred", "all" or None. Given {brief.tell(normalize)}.')


@dataclasses.dataclass(frozen=True)
class Outcomes(View):
    """Weights of the four outcomes, at one threshold or at many (on a last axis); 0/0 is `undefined`."""

    true_positives: Any
    false_positives: Any
    false_negatives: Any
    true_negatives: Any

    @property
    def positives(self) -> Any:
        """The weight of the positives."""
        return self.true_positives + self.false_negatives

    @property
    def negatives(self) -> Any:
        """The weight of the negatives."""
        return self.false_positives + self.true_negatives

    @property
    def accuracy(self) -> Any:
        """`(TP + TN) / (TP + TN + FP + FN)`."""
        right = self.true_positives + self.true_negatives
        return self.ratio(right, right + self.false_positives + self.false_negatives)

    @property
    def hamming_loss(self) -> Any:
        """`(FP + FN) / (TP + TN + FP + FN)`."""
        wrong = self.false_positives + self.false_negatives
        return self.ratio(wrong, wrong + self.true_positives + self.true_negatives)

    @property
    def precision(self) -> Any:
        """`TP / (TP + FP)`."""
        return self.ratio(self.true_positives, self.true_positives + self.false_positives)

    @property
    def recall(self) -> Any:
        """`TP / (TP + FN)`, also called sensitivity, or the true positive rate."""
        return self.ratio(self.true_positives, self.positives)

    @property
    def specificity(self) -> Any:
        """`TN / (TN + FP)`, the true negative rate."""
        return self.ratio(self.true_negatives, self.negatives)

    @property
    def negative_predictive_value(self) -> Any:
        """`TN / (TN + FN)`."""
        return self.ratio(self.true_negatives, self.true_negatives + self.false_negatives)

    @property
    def fall_out(self) -> Any:
        """`FP / (TN + FP)`, the false positive rate."""
        return self.ratio(self.false_positives, self.negatives)

    @property
    def balanced_accuracy(self) -> Any:
        """The mean of recall and specificity; one of them alone where there are no positives or no negatives."""
        xp = self.xp
        right = xp.stack(xp.broadcast_arrays(self.true_positives, self.true_negatives), -1)
        those = xp.stack(xp.broadcast_arrays(self.positives, self.negatives), -1)
        return self.mean_over(self.ratio(right, those), those != 0)

    def f_beta(self, beta: float) -> Any:
        """Returns `(1 + b^2) TP / ((1 + b^2) TP + FP + b^2 FN)`."""
        square = beta * beta
        found = (1 + square) * self.true_positives
        return self.ratio(found, found + self.false_positives + square * self.false_negatives)

    @property
    def iou(self) -> Any:
        """`TP / (TP + FP + FN)`, intersection over union: Jaccard's index."""
        union = self.true_positives + self.false_positives + self.false_negatives
        return self.ratio(self.true_positives, union)

    @property
    def matthews_corrcoef(self) -> Any:
        """`(TP TN - FP FN) / sqrt((TP + FP) (TP + FN) (TN + FP) (TN + FN))`."""
        tp, fp, fn, tn = self._divide_by_total()
        # Root by root: the product of the four overflows, or vanishes, long before its root does.
        root = self.xp.sqrt
        return self.ratio(tp * tn - fp * fn, root(tp + fp) * root(tp + fn) * root(tn + fp) * root(tn + fn))

    @property
    def cohen_kappa(self) -> Any:
        """`2 (TP TN - FN FP) / ((TP + FP) (FP + TN) + (TP + FN) (FN + TN))`: accuracy beyond that of chance."""
        tp, fp, fn, tn = self._divide_by_total()
        return self.ratio(2 * (tp * tn - fp * fn), (tp + fp) * (fp + tn) + (tp + fn) * (fn + tn))

    def kappa(self, weights: str | None) -> Any:
        """Returns `cohen_kappa`, for any weights of errors: they matter only between more than two classes."""
        return self.cohen_kappa

    def cost(self, false_positive: float, false_negative: float) -> Any:
        """Returns `(c_FP FP + c_FN FN) / (TP + TN + FP + FN)`."""
        spent = false_positive * self.false_positives + false_negative * self.false_negatives
        return self.ratio(spent, self.positives + self.negatives)

    def normalized(self, by: Normalize) -> Any:
        """Returns `[[TN, FP], [FN, TP]]` on two last axes, as it is, or as parts of the sums that `by` names."""
        xp = self.xp
        rows = (self.true_negatives, self.false_positives), (self.false_negatives, self.true_positives)
        matrix = xp.stack([xp.stack(row, -1) for row in rows], -2)
        return divide_matrix(self, matrix, matrix.sum(-1), matrix.sum((-2, -1)), by)

    def _divide_by_total(self) -> tuple[Any, Any, Any, Any]:
        """Returns the outcomes as parts of 1: products of weights may leave the range of float32."""
        total = self.positives + self.negatives
        four = (self.true_positives, self.false_positives, self.false_negatives, self.true_negatives)
        return tuple(self.zeroed().ratio(x, total) for x in four)  # pyright: ignore[reportReturnType]  # four


def divide_matrix(view: View, matrix: Any, support: Any, total: Any, by: Normalize) -> Any:
    """Returns a confusion matrix `[..., n, n]`, as it is, or divided by sums: `support [..., n]` of rows, `total`."""
    if by is None:
        return matrix
    sums = {"true": support[..., None], "pred": matrix.sum(-2)[..., None, :], "all": total[..., None, None]}
    return view.ratio(matrix, sums[by] * view.xp.ones_like(matrix))

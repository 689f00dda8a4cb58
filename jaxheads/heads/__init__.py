"""Floor 5: one file a head."""

from jaxheads.heads.binary_class import BinaryClassHead as BinaryClassHead
from jaxheads.heads.logistic_regression import LogisticRegressionHead as LogisticRegressionHead
from jaxheads.heads.multi_class import MultiClassHead as MultiClassHead
from jaxheads.heads.multi_label import MultiLabelHead as MultiLabelHead
from jaxheads.heads.poisson_regression import PoissonRegressionHead as PoissonRegressionHead
from jaxheads.heads.regression import RegressionHead as RegressionHead

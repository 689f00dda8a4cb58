"""Floor 3: one file a head."""

from jaxheads.heads.binary_class import BinaryClassHead as BinaryClassHead
from jaxheads.heads.multi_class import MultiClassHead as MultiClassHead
from jaxheads.heads.regression import RegressionHead as RegressionHead

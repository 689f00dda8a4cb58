"""Floor 6: heads made of heads, and factories."""

from jaxheads.compose.factories import binary_or_multi_class_head as binary_or_multi_class_head
from jaxheads.compose.global_objective import GlobalObjectiveHead as GlobalObjectiveHead
from jaxheads.compose.multi_head import MultiHead as MultiHead
from jaxheads.compose.sequential import SequentialHeadWrapper as SequentialHeadWrapper

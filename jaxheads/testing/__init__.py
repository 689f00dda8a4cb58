"""Floor 7: the laws of heads, for anybody's head: `check_head(head)`, in a test or in a notebook."""

from jaxheads.engine.samplers import sample_labels as sample_labels
from jaxheads.engine.samplers import sample_logits as sample_logits
from jaxheads.testing.check import Report as Report
from jaxheads.testing.check import check_head as check_head

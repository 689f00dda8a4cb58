"""Floor 7: the laws of heads. `check_head(head)` checks them for any head, in a test or in a notebook."""

from jaxheads.engine.samplers import sample_labels as sample_labels
from jaxheads.engine.samplers import sample_logits as sample_logits
from jaxheads.testing.check import Report as Report
from jaxheads.testing.check import check_head as check_head

"""Floor 7: heads as flax modules, with the last layer and the head's own values; flax models in parts, for steps."""

from jaxheads.nn.linen import LinenHead as LinenHead
from jaxheads.nn.nnx import HeadState as HeadState
from jaxheads.nn.nnx import NnxHead as NnxHead
from jaxheads.nn.splitting import Split as Split
from jaxheads.nn.splitting import split as split

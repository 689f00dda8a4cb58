"""Floor 7: heads as flax modules, with the last layer of the network and all that the head learns and keeps."""

from jaxheads.nn.linen import LinenHead as LinenHead
from jaxheads.nn.nnx import HeadState as HeadState
from jaxheads.nn.nnx import NnxHead as NnxHead

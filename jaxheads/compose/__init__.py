"""Floor 4: heads made of heads, and factories."""

from jaxheads.compose.factories import binary_or_multi_class_head as binary_or_multi_class_head

"""Golden cases made by TensorFlow's own heads, and what reads them."""

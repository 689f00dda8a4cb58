"""The compiler for TPUs is loaded by name; JAX itself must not look for chips."""

import jax

jax.config.update("jax_platforms", "cpu")

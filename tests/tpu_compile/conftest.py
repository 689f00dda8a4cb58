"""The compiler for TPUs is loaded by name; JAX itself must not look for chips."""

import jax

jax.config.update("jax_platforms", "cpu")
# What is compiled for chips that are not there is not loaded again, either.
jax.config.update("jax_enable_compilation_cache", False)

"""The JAX side: flax.nnx models, the step, one file per method."""

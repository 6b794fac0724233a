"""The jax implementations."""

"""The torch implementations."""

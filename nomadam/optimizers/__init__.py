"""Optimizers, one method a file."""

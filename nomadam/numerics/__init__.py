"""Tensor arithmetic that everyone shares; knows no optimizer."""

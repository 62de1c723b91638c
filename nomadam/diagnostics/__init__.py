"""Diagnostics: what can be measured of a model, its gradient and its training."""

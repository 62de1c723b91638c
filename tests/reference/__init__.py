"""Slow, obvious references: plain torch, nothing of nomadam."""

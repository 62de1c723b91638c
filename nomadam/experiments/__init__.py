"""Trainings that show what the optimizers do: each a function that returns a Run."""

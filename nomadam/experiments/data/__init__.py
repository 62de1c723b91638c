"""Data for the experiments: a local default, and real data sets by name or by path."""

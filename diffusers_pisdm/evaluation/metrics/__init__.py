"""Scores, and the statistics of features that they are computed from."""

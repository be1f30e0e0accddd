"""Scores, and the feature statistics they are computed from."""

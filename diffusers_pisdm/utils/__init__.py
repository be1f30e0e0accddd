"""Helpers for files, machines and image grids, shared by all parts of the package."""

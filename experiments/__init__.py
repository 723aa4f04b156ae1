"""Experiments: the grids behind the figures of this project."""

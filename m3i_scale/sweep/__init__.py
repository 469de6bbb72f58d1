"""Sweeps: a grid of configurations and seeds at equal compute, and its results.

The sweep starts training and evaluation as separate processes, as a user would, so that a run that
crashes does not end the others.
"""

"""Sweeps: a grid of configurations and seeds at equal compute, and what became of it.

The sweep starts training and evaluation as separate processes, as a user would: a run that crashes
takes nothing else with it.
"""

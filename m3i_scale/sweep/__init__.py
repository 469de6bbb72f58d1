"""Sweeps: a grid of configurations and seeds at equal compute, and what became of it.

Training and evaluation are started as the user would start them, as processes of their own: this
room needs only the configuration, and a run that crashes takes nothing else with it.
"""

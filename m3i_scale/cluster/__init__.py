"""Ranks, process groups and nodes: how a run starts on one machine or many."""

"""Damaged inputs and what must hold of each: one module per family of files."""

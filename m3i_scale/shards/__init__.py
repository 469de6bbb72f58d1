"""Offline tools for WebDataset shards: build, index, check, show."""

"""The networks: plain PyTorch modules on one device, independent of how they are parallelised."""

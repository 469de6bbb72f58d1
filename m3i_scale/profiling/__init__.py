"""FLOPs and memory of a training step, traced without data or a device."""

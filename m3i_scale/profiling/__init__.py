"""What a training step computes and keeps, traced without data or a device."""

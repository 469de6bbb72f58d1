"""What a run will need on which GPUs: memory, traffic, time; before anything is started."""

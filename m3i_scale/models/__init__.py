"""The networks: plain single-device modules that know nothing of parallelism."""

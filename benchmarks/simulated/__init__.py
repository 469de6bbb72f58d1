"""What `month.py` consists of: a failure trace, a stand-in for Slurm, injection, and matching."""

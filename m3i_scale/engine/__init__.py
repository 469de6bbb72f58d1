"""How it is run: ranks, ZeRO-3, the loop, schedules, teacher shards, checkpoints, metrics.

DeepSpeed is used here and in `cluster/launch.py`. Read `loop.py` first.
"""

"""How it is run: ranks, ZeRO-3, the loop, schedules, momentum shards, checkpoints, metrics.

The only room that knows DeepSpeed. Read `loop.py` first.
"""

"""What the engine trains: pre-training, and what a backbone is transferred to.

`task_of` gives the task of a configuration. A task joins a configuration, networks and samples; it
is all that the engine knows of them.
"""

from m3i_scale.tasks.registry import task_of

__all__ = ["task_of"]

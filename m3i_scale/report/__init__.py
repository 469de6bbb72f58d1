"""What became of a run's time: from events.jsonl and metrics.jsonl to pages.

`read` reads a run folder, `attempts` says when each attempt began and ended, `shares` divides the
time, `pages` and `picture` show it. All are functions of the files and of the time of day.
"""

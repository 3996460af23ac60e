"""Simulated power losses: ``python -m bench.powerloss``.

1. recording.py runs the steps of workload.py on a store, in a process in which record.c is
preloaded:
   every write, sync and rename is logged, and so is the end of each step.
2. disk.py models a disk: from the log up to some operation, it draws what may be left on it.
3. replay.py writes that to files, and check.py opens the store in them: it must contain the result
of
   the finished steps, and of the running step all or nothing.
4. run.py repeats this in a process of its own, which may crash.
"""

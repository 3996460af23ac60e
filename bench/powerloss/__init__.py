"""Power losses that a store has to survive: ``python -m bench.powerloss``.

1. recording.py does the steps of workload.py to a store in a process in which record.c is
   preloaded: every write, sync and change of a name goes to a log, and when each step was over.
2. disk.py is a disk: fed with the log up to some operation, it says what may be left on it.
3. replay.py writes that down as files, and check.py opens the store in them: it has to hold what
   the steps that were over have made, no more and no less, the last step done whole or not at all.
4. run.py does so many times in a process of its own, which may crash.
"""

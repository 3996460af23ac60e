"""Work on whole corpora and lists of questions: planned, resumable, on one machine or many.

::

    documents ─ work.plan() ─ Work ─ run.run() ─ a store          ragcache precompute
                                      │ by this process, or by workers on Ray (cluster.py)
    questions ─ order.by_chunks() ─ batch.answered() ─ answers    ragcache batch
    sizing.py, routing.py             what it will take            ragcache plan
"""

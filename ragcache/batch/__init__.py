"""Process whole corpora and lists of questions: planned, resumable, on one machine or many.

::

    documents ─ plan.make_plan() ─ PrecomputePlan ─ run.run() ─ store    ragcache precompute
                                                    │ in this process, or by workers on Ray (ray.py)
    questions ─ order.order_by_chunks() ─ answers                         ragcache batch

The cost of a corpus is estimated by :mod:`ragcache.sim.sizing` (``ragcache plan``).
"""

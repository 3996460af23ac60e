"""Simulations on traces of requests: eviction policies, routing, and the cost of a corpus.

``trace`` reads traces or generates synthetic ones. ``eviction`` replays them under every eviction
policy (:func:`~ragcache.sim.eviction.simulate`), ``routing`` over several replicas, and ``lru`` is
the set of chunks in RAM that they use. ``sizing`` estimates the bytes, time and money that a corpus
takes.
"""

"""Reliability experiments for stores and the service: ``python -m bench.reliability``.

There is one module per experiment. Each compares the store with an oracle that knows which writes
were acknowledged.
"""

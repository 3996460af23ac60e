"""Evidence that a store survives what happens to it: ``python -m bench.reliability``.

One module per experiment; each compares the store with an oracle that knows what was acknowledged.
"""

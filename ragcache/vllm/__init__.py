"""Fusion inside vLLM, and a service in front of it.

``connector`` and the workers (``cpu``, ``gpu``) are what vLLM loads; ``work`` is what they do
before a forward. Import from the modules: this one stays empty, so that it needs no vLLM.
"""

"""Traces of requests, and what eviction, routing and memory would do with them."""

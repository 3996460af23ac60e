"""Benchmarks: each prints the table that the documents show, and checks what it timed."""

"""Benchmarks: each checks the results that it timed, and prints the table in the documentation."""

"""Comparison of modes on questions with known answers."""

"""Engines run the model: they encode chunks, prefill prompts, and decode."""

"""Engines run the model: they encode chunks, walk a prompt's layers, and decode."""

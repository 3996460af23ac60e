"""Small random models and a tokenizer for the tests."""

from __future__ import annotations

from ragcache.testing.models import TEXT, engine, model, tokenizer

__all__ = ["TEXT", "engine", "model", "tokenizer"]

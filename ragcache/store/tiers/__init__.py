"""Stores that stand in front of another store."""

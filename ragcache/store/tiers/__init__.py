"""Tiers: stores in front of another store."""

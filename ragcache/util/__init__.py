"""Reusable memory, files for their owner only, and checks of list arguments."""

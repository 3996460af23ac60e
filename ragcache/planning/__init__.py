"""What to load and what to compute for a prompt: lookup, measured speeds, controller."""

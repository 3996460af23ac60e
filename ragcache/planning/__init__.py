"""What to load and what to compute: measured speeds, a cost model, the controller."""

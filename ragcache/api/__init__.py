"""REST service."""

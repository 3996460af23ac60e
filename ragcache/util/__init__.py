"""Memory buffers for reuse, files with mode 0600, and a check of list arguments."""

"""The script that makes ragcache's bundled model. Run `python -m examples.train_tiny --help`."""

"""``python -m ragcache``: the command line."""

from ragcache.cli import main

if __name__ == "__main__":
    main()

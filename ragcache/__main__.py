"""The command line: ``ragcache``, and ``python -m ragcache``."""

import sys


def main() -> None:
    """Run it. Ctrl-C ends it without a traceback while it is being imported, too."""
    try:
        from ragcache.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

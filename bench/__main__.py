"""``python -m bench``: run every benchmark."""

from __future__ import annotations

from bench import ttft

if __name__ == "__main__":
    ttft.main()

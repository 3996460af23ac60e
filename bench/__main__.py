"""``python -m bench``: run every benchmark and write docs/benchmarks.md."""

from __future__ import annotations

from bench import report

if __name__ == "__main__":
    report.main()

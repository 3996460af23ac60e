"""Build the site: ``python docs/site [FOLDER]``. A warning is an error."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from sphinx.cmd.build import main

HERE = Path(__file__).resolve().parent

sys.path[:0] = [str(HERE), str(HERE.parents[1])]
from conf import gather  # noqa: E402

with tempfile.TemporaryDirectory() as folder:
    gather(pages := Path(folder) / "pages")
    out = sys.argv[1] if len(sys.argv) > 1 else str(HERE.parents[1] / "site")
    sys.exit(
        main(["-c", str(HERE), "-d", f"{folder}/read", "-W", "--keep-going", "-q", str(pages), out])
    )

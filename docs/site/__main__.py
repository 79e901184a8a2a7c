"""Lay out the sources of the site: python -m docs.site FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

from docs.site.sources import ROOT, SourceError, lay_out

if __name__ == "__main__":
    try:
        lay_out(ROOT, Path(sys.argv[1]))
    except SourceError as error:
        sys.exit(f"docs: {error}")

"""`python -m docs.tutorial > docs/history.md`."""

import sys

from docs.tutorial.page import make

if __name__ == "__main__":
    sys.stdout.write(make())

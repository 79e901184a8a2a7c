"""`python -m services.history.tutorial > docs/history.md`."""

import sys

from services.history.tutorial.page import make

if __name__ == "__main__":
    sys.stdout.write(make())

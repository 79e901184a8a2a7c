"""`python -m services.metrics > docs/metrics.md`."""

import sys

from services.metrics.page import make

if __name__ == "__main__":
    sys.stdout.write(make())

"""`python -m kvplane.services.observability > docs/metrics.md`."""

import sys

from kvplane.services.observability.page import make

if __name__ == "__main__":
    sys.stdout.write(make())

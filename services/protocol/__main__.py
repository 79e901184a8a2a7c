"""Writes the documents of the fleet's subjects: `python -m kvplane.services.protocol subjects > docs/subjects.md`."""

from __future__ import annotations

import sys

from kvplane.services.protocol.document import asyncapi, markdown, yaml


def main() -> None:
    """Write one of the documents to standard output."""
    match sys.argv[1:]:
        case ["subjects"]:
            sys.stdout.write(markdown())
        case ["asyncapi"]:
            sys.stdout.write(
                f"# Made by `python -m kvplane.services.protocol asyncapi`; don't edit it.\n{yaml(asyncapi())}"
            )
        case _:
            sys.exit("usage: python -m kvplane.services.protocol subjects|asyncapi")


if __name__ == "__main__":
    main()

"""Pages of docs/ that are made from the code: `python -m docs.reference.NAME > docs/NAME.md`."""

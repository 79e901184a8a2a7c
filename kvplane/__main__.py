"""`python -m kvplane`, for starting kvplane without knowing where its command is installed."""

from kvplane.services.cli import main

if __name__ == "__main__":
    main()

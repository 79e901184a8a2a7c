"""`python -m services.cli`, for starting kvplane without knowing where its command is installed."""

from services.cli import main

if __name__ == "__main__":
    main()

"""`python -m lightning_trainer`, and what the console script calls."""

import sys

from lightning_trainer.cli import main


def run() -> None:
    """Exit with the status of the command line."""
    sys.exit(main())


if __name__ == "__main__":
    run()

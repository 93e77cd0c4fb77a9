"""`python -m sparsekit`."""

from sparsekit.cli import main

main()

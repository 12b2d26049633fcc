"""`python -m prefkit` is `prefkit`."""

from prefkit.cli import main

main()

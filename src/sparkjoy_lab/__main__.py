"""`python -m sparkjoy_lab` is the `sparkjoy` command."""

from sparkjoy_lab.cli import main

main()

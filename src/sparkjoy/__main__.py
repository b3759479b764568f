"""`python -m sparkjoy` is the `sparkjoy` command."""

from sparkjoy.lab.cli import main

main()

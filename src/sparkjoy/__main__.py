"""`python -m sparkjoy` is the `sparkjoy` command."""

from sparkjoy.cli import main

main()

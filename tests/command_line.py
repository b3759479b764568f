"""The `sparkjoy` command, called in this process."""

import sys

from sparkjoy_lab import cli


def sparkjoy(monkeypatch, capsys, *arguments):
    """Exit status and what was said on stderr."""
    monkeypatch.setattr(sys, "argv", ["sparkjoy", *map(str, arguments)])
    try:
        cli.main()
        status = 0
    except SystemExit as stop:
        status = stop.code
    return status, capsys.readouterr().err

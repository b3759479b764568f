"""Imported first: says what to install where TRL is missing, or another TRL than the one tested."""

TESTED = "1.16"

try:
    from trl import __version__ as found
except ImportError as error:
    raise ImportError("sparkjoy.integrations.trl needs TRL: pip install sparkjoy[trl]") from error

if not found.startswith(f"{TESTED}."):
    raise ImportError(
        f"sparkjoy.integrations.trl rests on private methods of TRL, tested in TRL {TESTED}; found {found}. Install "
        "that one: pip install sparkjoy[trl]"
    )

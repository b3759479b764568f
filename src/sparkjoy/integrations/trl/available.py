"""Imported first: says what to install where TRL is missing, or another TRL than those tested."""

OLDEST, NEXT = (1, 10), (1, 17)

try:
    from trl import __version__ as found
except ImportError as error:
    raise ImportError("sparkjoy.integrations.trl needs TRL: pip install sparkjoy[trl]") from error

if not OLDEST <= tuple(int(part) for part in found.split(".")[:2]) < NEXT:
    raise ImportError(
        "sparkjoy.integrations.trl rests on private methods of TRL, tested in TRL 1.10 to 1.16; found "
        f"{found}. Install one of those: pip install sparkjoy[trl]"
    )

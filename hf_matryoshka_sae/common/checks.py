"""Checks of options, in one wording."""


def check_at_least(least: float, /, **options: float | None) -> None:
    """Raise `ValueError` for the first of some options that is below `least`; an option may be `None`."""
    for name, value in options.items():
        if value is not None and value < least:
            raise ValueError(f"`{name}` must be at least {least}, got {value}.")

"""Checks of options, in one wording."""


def check_at_least(least: float, /, **options: float | None) -> None:
    """Raises `ValueError` that names the first of some options which is below `least`; `None` is not looked at."""
    for name, value in options.items():
        if value is not None and value < least:
            raise ValueError(f"`{name}` must be at least {least}, got {value}.")

"""The error that a user can mend. This file imports nothing, so that every other may import it."""


class BadInput(ValueError):
    """What the user gave (a file, an option, a prompt) cannot be used. The message says what is allowed."""


def check_finite(values, giving):
    """The values, a tensor. giving: who gives what. Raises BadInput for nan, which looks safe as nan < 0 is
    false, and for infinity."""
    if not values.isfinite().all():
        raise BadInput(f"{giving} that are not numbers, or not finite; look at its weights and their dtype")
    return values

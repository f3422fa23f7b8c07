"""The error that a user can mend. This file imports nothing, so that every other may import it."""


class BadInput(ValueError):
    """What the user gave (a file, an option, a prompt) cannot be used. The message says what is allowed."""


def check_finite(values, giving):
    """The values, a tensor. giving: who gives what. Raises BadInput for nan, which looks safe as nan < 0 is
    false, and for infinity."""
    if not values.isfinite().all():
        raise BadInput(f"{giving} that are not numbers, or not finite; look at its weights and their dtype")
    return values


def check_states(hidden, llama):
    """The final hidden states that a Llama has computed: (n, d). Raises ArithmeticError, which is a
    traceback, where some are nan though no weight is to blame: then the code is wrong, for example a mask. A
    weight is to blame if it is narrower than float32, not finite, or huge; check_finite tells the user."""
    if hidden.isnan().any() and hidden.element_size() >= 4:
        if all(p.abs().max() < 1e4 for p in llama.parameters()):        # nan is not below it
            raise ArithmeticError("hidden states are nan, though all weights are numbers: a mistake in the "
                                  "code that computes them. In a mask, for example, 0 · −inf is nan")
    return hidden

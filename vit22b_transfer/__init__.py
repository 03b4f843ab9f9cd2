"""Transfer of large image towers (the ViT-22B family) to image-text tasks."""


class UserError(ValueError):
    """Something that the user can mend: an input, a recipe, a file, a setting.

    The message says what was wrong, what was found, and what to do. The command prints
    it in one line; a program may catch it. Any other exception is a fault of ours.
    """

    exit_code = 1


class NotFiniteError(UserError, FloatingPointError):
    """A loss, gradient or score stopped being finite."""

    exit_code = 3

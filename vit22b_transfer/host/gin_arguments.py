"""Arguments that set a value of a recipe, written as in the docs."""

import re
import shlex

# What means itself between a shell's double quotes and, in gin, between single ones.
_PLAIN = re.compile(r"[\w@%+=:,./ ~-]+")


def gin_argument(name: str, value: str) -> str:
    """`--gin.NAME="'value'"`, for a shell."""
    if _PLAIN.fullmatch(value):
        return f"--gin.{name}=\"'{value}'\""
    return f"--gin.{name}={shlex.quote(repr(value))}"

class TimError(ValueError):
    """Something the user gave cannot be used; the message is one line: the thing, what was found, what was expected."""

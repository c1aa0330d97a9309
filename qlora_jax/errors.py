"""Errors meant for the person at the keyboard."""


class UserError(ValueError):
    """Bad input, told in one sentence that names the file, field or tensor and what to do about it.

    Fields of a config stand in backticks, with the value where that is the point: "`max_steps=0`: must be at least 1."
    The command line prints the message alone, its fields as flags ("--max_steps 0: ..."), and exits with status 1.
    """

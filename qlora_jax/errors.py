"""Errors meant for the person at the keyboard."""


class UserError(ValueError):
    """Bad input, told in one sentence that names the file, flag or tensor and what to do about it.

    Scripts print the message alone and exit with status 1; a traceback would only hide it.
    """

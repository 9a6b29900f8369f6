"""The errors that are written for users; every other exception is a bug, and keeps its traceback."""


class DreamerError(Exception):
    """One line, or a few, that name the cause and the fix."""

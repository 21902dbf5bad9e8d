"""Errors that are the user's to mend: the command line prints their message without a traceback."""


class UserError(ValueError):
  """Bad input or circumstances; the message says what is wrong, where, and what to do."""

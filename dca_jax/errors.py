"""Errors that are the user's to mend: the command line prints their message without a traceback."""


class UserError(ValueError):
  """Bad input or circumstances; the message says what is wrong, where, and what to do."""


class Terminated(Exception):
  """The process was asked to end, and ended at a safe place; the message says where it can go on."""

"""Errors that the user can fix: the command line prints their message without a traceback."""


class UserError(ValueError):
  """Bad input or circumstances; the message says what is wrong, where, and what to do."""


class Terminated(KeyboardInterrupt):
  """A run was asked to stop, and did; the message says by what, and where it can go on.

  No Exception: no library's `except Exception` may take it for a failure of its own.
  """

  def __init__(self, by: str, status: int, where: str = ""):
    where = where or " while it was starting; nothing is lost, the same command starts again"
    super().__init__(f"stopped by {by}{where}")
    self.by = by
    self.status = status
    """The process's exit status."""


def reason(error: BaseException) -> str:
  """What an error of a library says, in a line."""
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]

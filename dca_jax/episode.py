"""The six roles that a step can play in an answer: the vocabulary that tasks, reviewers and credit share."""

ROLES = ("necessary", "redundant", "irrelevant", "error", "inherits", "repair")

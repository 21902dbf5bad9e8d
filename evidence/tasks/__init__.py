"""Tasks whose steps have exact roles, beside `chains`: what a reviewer is audited on, and what
credit by turn is measured on.

dca-jax audit --config=configs/quickstart.py --config.task.name=evidence.tasks:KeyDoor ...
"""

from evidence.tasks.calculator import Calculator
from evidence.tasks.definitions import Definitions
from evidence.tasks.keydoor import KeyDoor
from evidence.tasks.search import Search

__all__ = ["Calculator", "Definitions", "KeyDoor", "Search"]

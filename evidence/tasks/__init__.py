"""Tasks whose steps have exact roles, beside `chains`: what a reviewer is audited on.

dca-jax audit --config=configs/quickstart.py --config.task.name=evidence.tasks:KeyDoor ...
"""

from evidence.tasks.definitions import Definitions
from evidence.tasks.keydoor import KeyDoor

__all__ = ["Definitions", "KeyDoor"]

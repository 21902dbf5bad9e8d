"""The settings of a run: Config, its sections, and what they say of each other."""

import dataclasses
import json
import operator
from collections.abc import Sequence
from typing import Any

from dca_jax.checks import at_least, between
from dca_jax.credit import Guarded, Scheme, Uniform
from dca_jax.devices.mesh import MeshConfig
from dca_jax.doors import nearest
from dca_jax.errors import UserError
from dca_jax.learner import LearnerConfig
from dca_jax.learner.supervised import WarmstartConfig
from dca_jax.policy import PolicyConfig
from dca_jax.review import Nobody, ReviewerConfig, Rewriter
from dca_jax.rollout import EngineConfig, RolloutConfig, SlotsConfig
from dca_jax.rollout.evaluate import EvaluateConfig
from dca_jax.rollout.prefixes import FromReviewer, Values
from dca_jax.rollout.spot import SpotConfig
from dca_jax.store.checkpoints import CheckpointConfig
from dca_jax.store.writers import LogConfig
from dca_jax.tasks import ChainsConfig, TaskConfig


class ConfigError(UserError):
  """A mistake in a config; the message names the key and says what to do."""


@dataclasses.dataclass(frozen=True)
class Config:
  """Everything that determines a run. A recipe sets what differs from these defaults."""

  seed: int = 0
  """Decides the problems and the noise of every step."""
  steps: int = 100
  """Training steps: batches sampled, reviewed and trained on."""
  task: TaskConfig = ChainsConfig()
  policy: PolicyConfig = PolicyConfig()
  warmstart: WarmstartConfig = WarmstartConfig()
  rollout: RolloutConfig = RolloutConfig()
  engine: EngineConfig = SlotsConfig()
  reviewer: ReviewerConfig = Nobody()
  value: Values = FromReviewer()
  spot: SpotConfig = SpotConfig()
  rewrite: Rewriter = Rewriter()
  credit: Scheme = Uniform()
  learner: LearnerConfig = LearnerConfig()
  evaluate: EvaluateConfig = EvaluateConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  log: LogConfig = LogConfig()
  mesh: MeshConfig = MeshConfig()

  def check(self) -> dict[str, str]:
    """Mistakes that no section can see alone."""
    bad = at_least(1, self, "steps") | between(0, 2**31 - 1, self, "seed")
    if self.policy.pretrained and self.warmstart.total:
      bad["warmstart.steps" if self.warmstart.steps else "warmstart.clean_steps"] = (
        "must be 0 with policy.pretrained"
      )
    if self.checkpoint.best and self.checkpoint.best not in self.evaluate.scores:
      bad["checkpoint.best"] = f"is no score{nearest(self.checkpoint.best, self.evaluate.scores)}"
    if self.sampled_before and self.learner.loss != "ppo":
      key = self.sampled_before
      bad["learner.loss"] = f"must be 'ppo' with {key}, because older policies sampled the batch"
    if self.rollout.carry and (why := self._cannot_carry):
      bad["rollout.carry"] = f"must be 0: {why}"
    if "labels" not in self.task.offers and (readers := _labelled(self.reviewer.members)):
      bad["reviewer.name"] = (
        f"asks {readers[0]}, which reads step labels, and task '{self.task.name}' has none"
      )
    elif missing := self._lacks:
      bad["reviewer.name"] = missing
    if self.credit.needs_checks:
      scheme = f"credit.scheme '{self.credit.scheme}'"
      if not self.spot.share:
        bad["spot.share"] = f"must be above 0 with {scheme}, which learns from spot checks"
      if not self.value.from_reviewer:
        bad["value.source"] = f"must be 'reviewer' with {scheme}"
    if any(member.reads_checks for member in self.reviewer.members) and not self.spot.share:
      bad["spot.share"] = "must be above 0 with reviewer.refit_every, which learns from spot checks"
    if self.value.needs and self.value.needs not in self.task.offers:
      bad["value.source"] = f"needs a task with an {self.value.needs}; '{self.task.name}' has none"
    for what in {*self.rewrite.needs} - {*self.task.offers}:
      bad["rewrite.source"] = f"needs a task with {what}; '{self.task.name}' has none"
    if self.rewrite.most > self.rollout.group:
      bad["rewrite.rows"] = f"must not exceed rollout.group ({self.rollout.group})"
    if self.rewrite.most and "environment" in self.task.offers:
      bad["rewrite.source"] = "must be 'none' with an environment, which would answer otherwise"
    if "demonstrations" not in self.task.offers:
      for key in _WARM:
        if operator.attrgetter(key)(self):
          bad[key] = f"must be 0, because task '{self.task.name}' has no demonstrations"
    return bad

  @property
  def scheme(self) -> Scheme:
    """`credit` as training uses it: guarded, where it believes what may be wrong."""
    return Guarded(inner=self.credit) if self.credit.guard and self._believes else self.credit

  @property
  def asks(self) -> bool:
    """Whether there is a reviewer, of whose reviews the scheme reads something."""
    return bool(self._wanted) and not self._unheard

  @property
  def _believes(self) -> bool:
    """Whether the scheme reads what a reviewer says that does not tell the task's own truth."""
    return bool(self._wanted) and not all(m.is_truth for m in self.reviewer.members if m.gives)

  @property
  def sampled_before(self) -> str:
    """The key that has batches sampled, in part or all, by older policies; empty where none has."""
    keys = {"reviewer.overlap": self.reviewer.overlap, "rollout.carry": self.rollout.carry}
    return next((key for key, value in keys.items() if value), "")

  @property
  def _cannot_carry(self) -> str:
    """Why no step can leave completions to the next; empty where it can."""
    if self.reviewer.overlap:
      return "with reviewer.overlap the next batch is sampled before this one is trained on"
    if "environment" in self.task.offers:
      return f"the environments of task '{self.task.name}' cannot wait for the next step"
    why = self.engine.cannot_carry(self.rollout)
    return why and f"engine '{self.engine.name}' {why}"

  @property
  def _wanted(self) -> set[str]:
    """What the scheme reads of reviews: roles, values or both."""
    return {*self.credit.reads} - (set() if self.value.from_reviewer else {"values"})

  @property
  def _unheard(self) -> bool:
    """Whether the scheme reads what nobody says."""
    return bool(self._wanted) and not any(member.gives for member in self.reviewer.members)

  @property
  def _lacks(self) -> str:
    """Why the scheme gets nothing, or not all, of what it reads from reviews; empty if it does."""
    scheme = f"credit.scheme '{self.credit.scheme}'"
    if self._unheard:
      return f"is '{self.reviewer.name}', so {scheme} would be uniform; choose a reviewer"
    for member in self.reviewer.members:
      missing = self._wanted - member.gives_of(self.task.offers)
      if missing and not (self.credit.reads_either and missing < self._wanted):
        what = "prefix values" if "values" in missing else "roles"
        who = (
          f"is '{member.name}', which" if member is self.reviewer else f"asks {member.name}, which"
        )
        return f"{who} gives no {what}, which {scheme} reads; see the value section"
    return ""

  def unused(self) -> dict[str, str]:
    """The keys that have no effect with the others, and why."""
    unused, scheme = {}, f"credit.scheme is '{self.credit.scheme}'"
    if self.policy.pretrained:
      unused["warmstart.seed"] = "policy.pretrained is set, so no weights are drawn"
    if "values" not in self.credit.reads:
      unused["value.source"] = f"{scheme}, which reads no values"
    if not self.credit.reads:
      unused["reviewer.name"] = f"{scheme}, which reads no review"
    elif "roles" not in self.credit.reads and not self.value.from_reviewer:
      unused["reviewer.name"] = f"{scheme} and value.source '{self.value.source}'"
    if not self._believes:
      unused["credit.guard"] = "no reviewer is believed that could be pleased"
    if (
      self.learner.loss == "ppo" and self.learner.updates_per_batch == 1 and not self.sampled_before
    ):
      # With one update on a fresh batch the ratio is exactly 1, so its clip never acts.
      why = "learner.updates_per_batch is 1, reviewer.overlap 0 and rollout.carry 0"
      unused |= dict.fromkeys(("learner.clip_low", "learner.clip_high"), why)
    return unused

  def implied(self) -> dict[str, Any]:
    """What other settings decide of the keys that nobody set."""
    values = {
      f"task.{key}": value for key, value in self.task.implied(self.policy.pretrained).items()
    }
    if "demonstrations" not in self.task.offers or self.policy.pretrained:
      values |= {"warmstart.clean_steps": 0, "warmstart.steps": 0}
    if self._wanted == {"values"} and self.reviewer.models:
      values["reviewer.client.level"] = "values"
    if self.credit.needs_checks:
      values |= {"spot.share": 0.05, "spot.first": 2}
    return values

  def gives_way(self) -> set[str]:
    """Keys at odds with another one, which are left out where the other was said later."""
    gives, offers = set(), self.task.offers
    if "demonstrations" not in offers or self.policy.pretrained:
      gives |= {key for key in _WARM if operator.attrgetter(key)(self)}
    if "labels" not in offers:
      gives |= {"reviewer.name"} if _labelled(self.reviewer.first) else set()
      gives |= {"reviewer.escalate"} if _labelled(self.reviewer.second) else set()
    if self._unheard:
      gives.add("credit.scheme")
    return gives

  def to_json(self) -> str:
    """The text of a workdir's config.json."""
    return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

  def fixed(self) -> dict[str, Any]:
    """All keys that change what is computed, and their values."""
    return {k: v for k, v in flatten(dataclasses.asdict(self)).items() if not is_free(k, self)}


def _labelled(members: Sequence[ReviewerConfig]) -> list[str]:
  """Those of some reviewers that read a task's own step labels."""
  return [member.name for member in members if "labels" in member.reads_truth]


_WARM = ("warmstart.clean_steps", "warmstart.steps")

# Keys that a resumed run may change: they alter what is saved, measured and spent, not what is
# learnt from.
_FREE = (
  "checkpoint.",
  "evaluate.",
  "log.",
  "mesh.",
  "reviewer.audit_every",
  "reviewer.audit_floor",
  "reviewer.deadline",
  "reviewer.required",
  "reviewer.client.",
  "rewrite.client.",
  "rewrite.deadline",
  "task.turn_seconds",
  "task.verifier_seconds",
)
# Except for these keys of a client, which decide what is asked.
ASKED = (
  *("model", "thinking", "base_url", "vertex", "max_output_tokens", "whole_group"),
  *("rubric", "examples", "level", "reference", "samples"),
)


def is_free(key: str, config: Config) -> bool:
  """Whether a resumed run may change the key."""
  if key == "steps":
    # More steps continue the same run, unless the learning rate depends on where the end is.
    return config.learner.schedule == "constant"
  return key.startswith(_FREE) and key.partition(".client.")[2] not in ASKED


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """The settings of nested sections by their full keys, each begun with `prefix`."""
  flat: dict[str, Any] = {}
  for key, value in nested.items():
    flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
  return flat


def nested(flat: dict[str, Any]) -> dict[str, Any]:
  """The sections of flat settings; the opposite of `flatten`."""
  sections: dict[str, Any] = {}
  for key, value in flat.items():
    *path, name = key.split(".")
    place = sections
    for section in path:
      place = place.setdefault(section, {})
    place[name] = value
  return sections

"""One training step, top to bottom: sample, verify, review, assign credit, update."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dca_jax.credit import ReviewArrays, assign_credit
from dca_jax.devices.processes import fetch, gather, put
from dca_jax.episode import Episode, Review
from dca_jax.learner import Batch, Rewrites
from dca_jax.review import Proposing, Request, Truth
from dca_jax.review.episodes import Asked, ask, audited, too_blind, wait_for_reviews, worth_a_review
from dca_jax.rollout import Continues, Group, Rollout, Spent, collect, collect_whole
from dca_jax.rollout.rewrites import Proposals, drawn, rows_of_rewrites, verified
from dca_jax.rollout.spot import measured
from dca_jax.run import Trainer, copy
from dca_jax.store.trajectories import write_trajectories
from dca_jax.tally import Clock, Credited, Tally, merge, tally, waits


class Measured(NamedTuple):
  """What a step says of itself."""

  metrics: dict[str, float]
  problem: str | None
  """Why the reviewer thinks that the run should end."""
  stop: str
  """What has asked the run to stop; empty while nothing did."""
  credit: np.ndarray
  """The advantages of the tokens that this process sampled."""


def train_step(t: Trainer, step: int) -> Measured:
  """Takes `t.state` one step further and writes the step's trajectories.

  A function of (config, step, state) alone, so a resumed run repeats it.
  """
  t.stops.phase("sampling")
  clock = Clock()
  with jax.transfer_guard("disallow"):
    params = t.for_sampler(t.whole(t.state.params))
    rollout = next_batch(t, step, params)
    clock.lap("sample")

    # The reference runs on the devices while the host waits for reviews.
    batch = t.reference(on_devices(t, rollout))
    rollout, spot = spot_checked(t, step, params, rollout, clock)  # Meanwhile, too.
    rollout, batch, proposals = rewritten(t, step, params, rollout, batch, clock)
    reviews = reviews_of(t, rollout.asked, t.config.reviewer.deadline, "values")
    policy = Continues(t.sampler, params, further_noise(t, step))
    reviews, continued = t.values.ask(policy, rollout, reviews)
    del params, policy  # A layout of its own would take memory while gradients do.
    clock.lap("review")

    rollout = rollout._replace(episodes=reviewed(rollout.episodes, reviews))
    kept, group = jax.device_get(t.state.credit), t.config.rollout.group
    facts = t.scheme.facts(kept, rollout.episodes, group, rollout.step_ids_BxT.shape[1])
    rewards_PxG = rollout.rewards_B.reshape(-1, group)
    said = ReviewArrays.of(reviews, rollout.step_ids_BxT)
    given = put((rewards_PxG, rollout.truncated_B, said, facts), t.rows)
    rewards_PxG, truncated_B, said, facts = given
    said, memory = t.values.read(t.policy, t.state.value_head, t.whole(t.state.params), batch, said)
    advantages = assign_credit(t.scheme, rewards_PxG, batch.sampled_BxT, truncated_B, said, facts)
    batch = batch._replace(advantages_BxT=advantages.tokens_BxT)

    t.check_held()
    t.stops.phase("update", at_once=False)  # From here on the step is finished.
    t.checkpoints.release()
    stats = update(t, batch)
    head, more = t.values.learn(t.state.value_head, memory, batch, rewards_PxG)
    t.state = t.state._replace(value_head=head, unfinished=put(rollout.unfinished, t.rows))

    host, values_BxK = fetch((advantages, said.values_BxK), t.rows)
    credited = Credited(values_BxK, host, continued, spot, proposals)
    episodes = credited.finished(rollout.episodes)
    write_trajectories(t.folder / "trajectories", step, jax.process_index(), episodes)
    numbers = {key: float(x) for key, x in jax.device_get(stats | more).items()}
    clock.lap("update")

  own = reviewer_metrics(t, step, rollout)
  mine = tally(t.scheme, rollout, credited, own, clock, labels_of(t))
  evidence = t.scheme.evidence(kept, rollout.episodes, group)
  metrics, problem, stop = together(t, kept, mine, evidence)
  return Measured(metrics | numbers, problem, stop, host.tokens_BxT[rollout.sampled_BxT])


def next_batch(t: Trainer, step: int, params: Any) -> Rollout:
  """The batch to train on in `step`; with `reviewer.overlap` it was sampled a step ago, and the
  next one is on its way to the reviewer."""
  if not t.config.reviewer.overlap:
    return begin(t, step, params)
  # After a resume it is sampled again, by the same policy.
  batch = t.ahead or begin(t, step, t.for_sampler(t.whole(t.state.behind)))
  t.ahead = begin(t, step + 1, params) if step < t.config.steps else None
  return batch


def begin(t: Trainer, step: int, params: Any) -> Rollout:
  """Samples a batch; the reviewer reads what is complete of it while the devices go on."""
  c, submit = t.config.reviewer, t.reviewer.begin_step(step)

  def handed_over(group: Group) -> Group:
    episodes = group.episodes
    if t.config.learner.mask_truncated:
      episodes = [*map(_left_out_if_truncated, episodes)]
    chosen = worth_a_review(t.scheme, episodes, c.sample_frac)
    return group._replace(episodes=episodes, asked=ask(submit, episodes, chosen, c.deadline))

  sampled = t.sampler, t.config.seed, step, params, handed_over
  if t.config.rollout.carry:
    return collect_whole(*sampled, fetch(t.state.unfinished, t.rows))
  return collect(*sampled)


def _left_out_if_truncated(episode: Episode) -> Episode:
  return dataclasses.replace(episode, trained=episode.trained and not episode.outcome.truncated)


def on_devices(t: Trainer, rollout: Rollout) -> Batch:
  """What the devices need of a batch, before credit is assigned."""
  trained_B = np.array([episode.trained for episode in rollout.episodes])
  arrays = rollout.prompts_PxS, rollout.prompt_lengths_P, rollout.tokens_BxT, rollout.sampled_BxT
  return Batch(*put((*arrays, trained_B, rollout.logprobs_BxT), t.rows))


def spot_checked(
  t: Trainer, step: int, params: Any, rollout: Rollout, clock: Clock
) -> tuple[Rollout, Spent | None]:
  """The batch with its spot checks, and what they took; None where nothing is checked."""
  if not t.config.spot.share:
    return rollout, None
  policy = Continues(t.sampler, params, further_noise(t, step, 2**31))
  rollout, spent = measured(t.config.spot, t.config.seed, step, policy, rollout)
  clock.lap("spot")
  return rollout, spent


def rewritten(
  t: Trainer, step: int, params: Any, rollout: Rollout, batch: Batch, clock: Clock
) -> tuple[Rollout, Batch, Proposals | None]:
  """The batch with the rewrites that the policy has borne out, on the host and on the devices, and
  what that took; None where nobody proposes any."""
  c = t.config.rewrite
  if not isinstance(c, Proposing):
    return rollout, batch, None
  episodes, group = rollout.episodes, t.config.rollout.group
  asked = ask(
    t.rewriter.begin_step(), episodes, drawn(c, t.config.seed, episodes, group), c.deadline
  )
  said = reviews_of(t, [asked], c.deadline, "rewrites")
  policy = Continues(t.sampler, params, (*further_noise(t, step, 2**31), _REWRITES))
  rollout, proposals = verified(c.answers, policy, rollout, said)
  rows = rows_of_rewrites(c, rollout.episodes, group, rollout.tokens_BxT.shape[1])
  clock.lap("rewrite")
  return rollout, batch._replace(rewrites=Rewrites(*put(rows, t.rows))), proposals


_REWRITES = 2  # Behind the rounds of spot checks, in the noise of further answers.


def reviews_of(t: Trainer, asked: Sequence[Asked], deadline: float, then: str) -> list[Review]:
  t.stops.phase("reviews", seconds=deadline)
  return t.stops.wait(functools.partial(wait_for_reviews, asked, deadline), then=then)


def reviewed(episodes: Sequence[Episode], reviews: Sequence[Review]) -> list[Episode]:
  pairs = zip(episodes, reviews, strict=True)
  return [dataclasses.replace(episode, review=review) for episode, review in pairs]


def update(t: Trainer, batch: Batch) -> dict[str, jax.Array]:
  """The optimizer steps on a batch; returns the metrics of the last."""
  if t.config.reviewer.overlap:
    t.state = t.state._replace(behind=copy(t.state.params))
  first: dict[str, Any] = {}
  for i in range(t.config.learner.updates_per_batch):
    # What older policies sampled has its ratio against these, in every update.
    on_policy = t.on_policy[i == 0 and not t.config.sampled_before]
    t.state, stats, logprobs_BxT = t.update(t.state, batch, on_policy, t.frozen)
    if i == 0:
      first = stats
      if not t.config.sampled_before:
        batch = batch._replace(logprobs_BxT=logprobs_BxT)
  return stats | {"sampler/logprob_error": first["sampler/logprob_error"]}


def reviewer_metrics(t: Trainer, step: int, rollout: Rollout) -> dict[str, float]:
  """What the reviewer says of itself, and now and then how it meets faults planted in a batch."""
  metrics, config = t.reviewer.stats(), t.config.reviewer
  metrics |= {k.replace("review/", "rewrite/"): x for k, x in t.rewriter.stats().items()}
  if config.audit_every and step % config.audit_every == 0:
    metrics |= audited(t.reviewer, rollout.episodes, labels_of(t), config.deadline)
  return metrics


def labels_of(t: Trainer) -> Callable[[Request], Sequence[str]] | None:
  """The task's own, if it has any."""
  return Truth.of(t.task).labels if "labels" in t.config.task.offers else None


def together(
  t: Trainer, kept: Any, mine: Tally, evidence: Any
) -> tuple[dict[str, float], str | None, str]:
  """What all processes say of a step, from which the scheme learns: metrics, and `problem` and
  `stop` of `Measured`.

  The one place in a step where they hear of each other's samples, apart from the arrays.
  """
  problem = t.reviewer.problem() or t.rewriter.problem()
  told = gather("metrics", [mine, evidence, problem, t.stops.reason])
  counted, evidences, problems, reasons = zip(*told, strict=True)
  tallies = [Tally(*one) for one in counted]
  kept, found = t.scheme.learn(kept, evidences)
  t.state = t.state._replace(credit=put(kept, t.programs.everywhere))
  metrics = merge(tallies) | waits(tallies) | found
  problems = *problems, too_blind(metrics, t.config.reviewer.audit_floor)
  return metrics, next(filter(None, problems), None), next(filter(None, reasons), "")


def further_noise(t: Trainer, step: int, kind: int = 0) -> tuple[int, int]:
  """That of a step's further answers; sampling has none of it, because seeds end below 2**31, and
  so do steps, so `kind` sets that of spot checks apart from that of values."""
  return t.config.seed + 2**31, kind + step

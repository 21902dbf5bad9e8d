"""The twelve invariants that no reviewer can break, I1 to I12; reviews are random, hostile,
missing and no numbers.

More on `weighted` and `signed` is in test_schemes.py: sums, signs and caps in
`test_sums_signs_and_caps`, silence in `test_a_review_that_says_nothing_...`, and examples that can
be followed by hand.
"""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_schemes import (
  CONFIGS,
  INHERITS,
  INSANE,
  IRRELEVANT,
  NECESSARY,
  SANE,
  TINY,
  WILD,
  B,
  G,
  K,
  P,
  T,
  _batch,
  _batches,
  _compute,
  _jitted,
  _mask,
  _uniform,
  _usable,
  make,
)

from dca_jax.credit import ReviewArrays, token_advantages
from dca_jax.episode import ROLES
from dca_jax.review import REVIEWERS, Request, Truth, open_reviewer
from dca_jax.tasks import Chains, ChainsConfig
from evidence.lab import tree

RTG, CAPO = make(scheme="return_to_go"), make(scheme="capo")
SAFE, OWN = make(scheme="potential"), make(scheme="potential", discount=0.0)
WEIGHTED, SIGNED = make(scheme="weighted"), make(scheme="signed")
POTENTIALS = [
  SAFE,
  OWN,
  dataclasses.replace(SAFE, discount=0.9),
  dataclasses.replace(OWN, log_epsilon=0.01),
]


def _name(config):
  return "-".join(str(getattr(config, key, "")) for key in ("scheme", "discount", "log_epsilon"))


def _step_coefficients(tokens, batch, i):
  """The coefficient of each step of row i; all tokens of a step have the same."""
  ids = batch["review"].step_ids_BxT[i, : batch["lengths"][i]]
  firsts = [int(np.argmax(ids == k)) for k in range(ids[-1] + 1)]
  for k, first in enumerate(firsts):
    assert np.unique(tokens[i, : len(ids)][ids == k]).size == 1, first
  return [float(tokens[i, first]) for first in firsts]


def _phi(config, batch, i, baseline):
  """The values of row i's prefixes, missing ones filled, as the docstring
  of `potential` says; None without any."""
  ids = batch["review"].step_ids_BxT[i, : batch["lengths"][i]]
  given_ = batch["review"].values_BxK[i, : ids[-1] + 1].astype(float)
  known = (given_ >= 0) & (given_ <= 1)
  if not known.any() or not batch["review"].ok_B[i]:
    return None
  phi, last, epsilon = [], min(max(baseline, 0.0), 1.0), config.log_epsilon
  for value, ok in zip(given_, known, strict=True):
    if ok:
      last = np.log1p(value / epsilon) / np.log1p(1 / epsilon) if epsilon else value
    phi.append(last)
  return phi


# I1: what each scheme conserves.


@settings(max_examples=40, deadline=None)
@given(batch=_batches())
def test_i1_redistributed_rewards_sum_to_the_reward(batch):
  # With no reward elsewhere in the group the baseline is 0, so a token's advantage is the reward
  # still to come.
  batch["rewards"][:, 1:] = 0
  rows = np.arange(0, B, G)
  to_go, rewards = _compute(RTG, batch)[rows].astype(float), batch["rewards"][:, 0]
  paid = to_go - np.append(to_go[:, 1:], np.zeros((P, 1)), 1)
  assert (paid >= -1e-6).all()
  np.testing.assert_allclose(paid.sum(1), rewards, rtol=1e-6)


@pytest.mark.parametrize("config", POTENTIALS, ids=_name)
@settings(max_examples=20, deadline=None)
@given(batch=_batches())
def test_i1_changes_of_value_telescope_to_the_reward(config, batch):
  tokens, rewards = _compute(config, batch), batch["rewards"].reshape(-1).astype(float)
  advantages = _uniform(make(), batch)
  for i in range(B):
    phi = _phi(config, batch, i, rewards[i] - float(advantages[i, 0]))
    if phi is None:
      assert np.array_equal(tokens[i], advantages[i])
      continue
    change = np.diff([*phi, rewards[i]])
    wanted = [
      sum(config.discount ** (j - k) * change[j] for j in range(k, len(phi)))
      for k in range(len(phi))
    ]
    coefficients = _step_coefficients(tokens, batch, i)
    np.testing.assert_allclose(coefficients, wanted, atol=1e-6)
    if config.discount == 0:
      assert sum(coefficients) == pytest.approx(rewards[i] - phi[0], abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(batch=_batches())
def test_i1_capo_conserves_nothing(batch):
  """What a completion's sum loses is the penalty times its blamed tokens, beyond those
  of the others."""
  blame = _blame_by_hand(CAPO, batch)
  tokens = _compute(CAPO, batch).astype(float)
  ok = batch["review"].ok_B & _usable(batch)
  mass = _uniform(CAPO, batch).astype(float).sum(1)
  lost = np.where(
    ok, CAPO.penalty * (blame.sum(1) - _others_blame(blame, batch, ok) * batch["lengths"]), 0
  )
  scale = (
    1 + np.abs(tokens).sum(1) + CAPO.penalty * _others_blame(blame, batch, ok) * batch["lengths"]
  )
  assert (np.abs(tokens.sum(1) - (mass - lost)) <= 1e-6 * scale).all()


def test_i1_capo_pays_for_marking_steps_as_wrong():
  batch = _batch(3)
  batch["truncated"][:] = False
  gained = _compute(CAPO, batch).astype(float).sum(1) - _uniform(CAPO, batch).astype(float).sum(1)
  assert np.abs(gained).max() > 1


def _blame_by_hand(config, batch):
  """The blame of every token in float64, 0 in rows without a usable review."""
  ids, roles, weights, _, ok = batch["review"]
  tables = np.where(
    batch["truncated"][:, None],
    *(x.array()[None].astype(float) for x in (config.blame_truncated, config.blame)),
  )
  sane = np.where((weights >= 0) & (weights <= 1000), weights, 0.0)
  per_step = np.take_along_axis(tables, roles, 1) * sane
  blame = np.take_along_axis(per_step, ids, 1) * (_mask(batch) & (ok & _usable(batch))[:, None])
  for own, length, cut in zip(blame, batch["lengths"], batch["truncated"], strict=True):
    ends_with = float(own[length - 1])
    while not cut and length and own[length - 1] == ends_with:
      length -= 1
      own[length] = 0
  return blame


def _others_blame(blame, batch, ok):
  """For each completion the mean blame of a token in the others of its group
  that have a usable review."""
  mean = (blame.sum(1) / batch["lengths"] * ok).reshape(P, G)
  count = ok.reshape(P, G).sum(1, keepdims=True) - ok.reshape(P, G)
  return ((mean.sum(1, keepdims=True) - mean) / np.maximum(count, 1)).reshape(-1)


# I2: no sign flips.


@pytest.mark.parametrize(
  "config", [WEIGHTED, make(scheme="weighted", lam=1.0, cap=1000.0, **WILD)], ids=_name
)
@settings(max_examples=20, deadline=None)
@given(batch=_batches())
def test_i2_weighted_flips_no_sign(config, batch):
  """No token of a win is discouraged and none of a loss encouraged."""
  advantages = _uniform(config, batch)
  assert (np.sign(_compute(config, batch)) * np.sign(advantages) >= 0).all()
  assert not _compute(config, batch)[advantages == 0].any()


# I3: who says nothing changes nothing.


@pytest.mark.parametrize("scheme", ["weighted", "signed"])
@settings(max_examples=20, deadline=None)
@given(batch=_batches(), role=st.integers(0, len(ROLES) - 1), weight=st.sampled_from(SANE))
def test_i3_a_reviewer_that_calls_all_steps_alike_is_no_reviewer(scheme, batch, role, weight):
  alike = {
    "roles_BxK": np.full((B, K), role, np.int32),
    "weights_BxK": np.full((B, K), weight, np.float32),
  }
  for config in (c for c in CONFIGS if c.scheme == scheme):
    assert np.array_equal(_compute(config, batch, **alike), _uniform(config, batch))


@pytest.mark.parametrize("config", [*CONFIGS, *POTENTIALS, RTG, CAPO], ids=_name)
@settings(max_examples=8, deadline=None)
@given(batch=_batches())
def test_i3_without_reviews_every_scheme_is_uniform(config, batch):
  assert np.array_equal(_compute(config, batch, ok_B=np.zeros(B, bool)), _uniform(config, batch))


# I4: a group has no order.


@pytest.mark.parametrize("config", [make(), WEIGHTED, SIGNED, *POTENTIALS, RTG, CAPO], ids=_name)
@settings(max_examples=12, deadline=None)
@given(batch=_batches(), data=st.data())
def test_i4_permuting_a_group_permutes_its_tokens(config, batch, data):
  order = np.concatenate([np.array(data.draw(st.permutations(range(G)))) + G * p for p in range(P)])
  moved = {
    "rewards": batch["rewards"].reshape(-1)[order].reshape(P, G),
    "lengths": batch["lengths"][order],
    "truncated": batch["truncated"][order],
    "review": ReviewArrays(*(x[order] for x in batch["review"])),
  }
  ours, theirs = _compute(config, moved), _compute(config, batch)[order]
  if config.scheme in ("return_to_go", "capo"):  # The group's mean is summed in another order.
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6 * max(1, np.abs(theirs).max()))
  else:
    assert np.array_equal(ours, theirs)


# I5: nothing that is written into an answer changes its total.


def _with_probe(batch, row, after, role, weight, value, tokens=4):
  """The batch with a step of so many tokens put behind step `after` of a row;
  its other steps keep what was said."""
  ids, roles, weights, values, ok = (x.copy() for x in batch["review"])
  length = batch["lengths"][row]
  at = int(np.searchsorted(ids[row, :length], after, "right"))
  grown = np.concatenate([ids[row, :at], [after + 1] * tokens, ids[row, at:length] + 1])
  ids[row] = np.append(grown, np.zeros(T - len(grown), int))
  for array, new in ((roles, role), (weights, weight), (values, value)):
    array[row] = np.insert(array[row], after + 1, new)[:K]
  lengths = batch["lengths"].copy()
  lengths[row] += tokens
  return {**batch, "lengths": lengths, "review": ReviewArrays(ids, roles, weights, values, ok)}


@pytest.mark.parametrize(
  "config",
  [
    OWN,
    POTENTIALS[3],
    RTG,
    *(make(scheme=s, conserve="completion") for s in ("uniform", "weighted", "signed")),
  ],
  ids=_name,
)
@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("role", ROLES)
def test_i5_a_probe_leaves_the_total_alone(config, after, role):
  batch = _batch(9, np.tile([1.0, 0.0, 0.0, 0.0], (P, 1)))
  batch["lengths"][:] = 16
  batch["review"].step_ids_BxT[:] = np.minimum(np.arange(T) // 4, 3)
  batch["truncated"][:] = False
  probed = _with_probe(batch, 0, after, ROLES.index(role), 3.0, 0.9)

  def total(batch):
    tokens = _compute(config, batch)
    if config.scheme == "potential":
      return sum(_step_coefficients(tokens, batch, 0))
    if (
      config.scheme == "return_to_go"
    ):  # Of the rewards paid out, the rest of the group having none.
      return float(tokens[0, 0])
    return float(tokens[0].astype(float).sum())

  assert total(probed) == pytest.approx(total(batch), rel=1e-6)


@pytest.mark.parametrize("scheme", ["uniform", "weighted", "signed", "return_to_go", "potential"])
@settings(max_examples=20, deadline=None)
@given(
  batch=_batches(),
  after=st.integers(0, K - 2),
  role=st.integers(0, len(ROLES) - 1),
  weight=st.sampled_from([*SANE, *INSANE]),
  value=st.sampled_from([0.0, 0.5, 1.0, *INSANE]),
  tokens=st.integers(1, 6),
)
def test_i5_no_probe_whatever_is_said_of_it_changes_the_total(
  scheme, batch, after, role, weight, value, tokens
):
  batch["lengths"] = np.minimum(batch["lengths"], T - 6)
  ids, _, _, values, ok = batch["review"]
  np.minimum(ids, K - 2, out=ids)
  after = min(after, int(ids[0, batch["lengths"][0] - 1]))
  batch["rewards"][0, 1:] = 0  # So that return_to_go's baseline is 0.
  if scheme == "potential":  # Without any value there is nothing to telescope.
    values[0, 0], ok[0] = 0.25, True
  config = {"potential": OWN, "return_to_go": RTG}.get(
    scheme, make(scheme=scheme, conserve="completion")
  )
  probed = _with_probe(batch, 0, after, role, weight, value, tokens)
  ours, theirs = (_compute(config, b)[0].astype(float) for b in (batch, probed))
  if scheme == "potential":
    totals = [sum(_step_coefficients(_compute(config, b), b, 0)) for b in (batch, probed)]
    assert totals[0] == pytest.approx(totals[1], abs=1e-6)
  elif (
    scheme == "return_to_go"
  ):  # Of the rewards paid out; without a usable review every token has all of it.
    assert (
      ours[0]
      == pytest.approx(theirs[0], rel=1e-6)
      == pytest.approx(batch["rewards"][0, 0], rel=1e-6)
    )
  else:
    assert (
      abs(ours.sum() - theirs.sum()) <= 1e-6 * (np.abs(ours).sum() + np.abs(theirs).sum()) + TINY
    )


# I6: where steps are cut does not matter, where what is said is the same.


@pytest.mark.parametrize("config", [WEIGHTED, SIGNED, CONFIGS[1], RTG, CAPO], ids=_name)
@settings(max_examples=12, deadline=None)
@given(batch=_batches(), later=hnp.arrays(bool, (B, T)))
def test_i6_cutting_steps_in_two_changes_nothing(config, batch, later):
  whole = batch["review"].step_ids_BxT // 2
  roles, weights = (
    getattr(batch["review"], name)[:, : K // 2] for name in ("roles_BxK", "weights_BxK")
  )
  one = {"roles_BxK": np.tile(roles, 2), "weights_BxK": np.tile(weights, 2)}
  two = {"roles_BxK": roles.repeat(2, 1), "weights_BxK": weights.repeat(2, 1)}
  # Any of a step's tokens may go to its second half.
  halves = whole * 2 + later
  ours = _compute(config, batch, step_ids_BxT=whole, **one)
  assert np.array_equal(_compute(config, batch, step_ids_BxT=halves, **two), ours)


@pytest.mark.parametrize("config", [WEIGHTED, SIGNED, RTG, CAPO], ids=_name)
def test_i6_cutting_where_something_else_is_said_does(config):
  batch = _batch(6)
  whole = np.minimum(batch["review"].step_ids_BxT, 2)
  moved = _compute(config, batch, step_ids_BxT=np.where(np.arange(T) >= 12, whole + 3, whole))
  assert not np.allclose(moved, _compute(config, batch, step_ids_BxT=whole))


# I7: a prefix does not hear of what follows.


def _edited_behind(batch, other, j):
  """The batch with everything that is said of steps behind `j` taken from another one."""
  edited = {}
  for name in ("roles_BxK", "weights_BxK", "values_BxK"):
    edited[name] = getattr(batch["review"], name).copy()
    edited[name][:, j + 1 :] = getattr(other["review"], name)[:, j + 1 :]
  return edited


@pytest.mark.parametrize(
  "config", [SAFE, OWN, POTENTIALS[3], make(scheme="potential", log_epsilon=0.01)], ids=_name
)
@settings(max_examples=20, deadline=None)
@given(batch=_batches(), other=_batches(), j=st.integers(0, K - 2))
def test_i7_values_behind_a_step_do_not_reach_it(config, batch, other, j):
  tokens, after = (
    _compute(config, batch),
    _compute(config, batch, **_edited_behind(batch, other, j)),
  )
  # At discount 1 a step hears of the outcome only; at 0 of the next prefix too.
  early = batch["review"].step_ids_BxT <= (j if config.discount else j - 1)
  values = batch["review"].values_BxK[:, : j + 1]
  valued = ((values >= 0) & (values <= 1)).any(1)[:, None]
  assert np.array_equal(tokens[early & valued], after[early & valued])
  # Without a value so far a step has the group's baseline; a review of no value at all is uniform,
  # which is the same number computed in another way. (Not with logarithms: they make another number
  # of the baseline.)
  if config.discount:
    np.testing.assert_allclose(tokens[early], after[early], atol=1e-6)


@pytest.mark.parametrize("config", [WEIGHTED, SIGNED, RTG, OWN, POTENTIALS[2]], ids=_name)
def test_i7_the_other_schemes_do_hear_of_what_follows(config):
  """So the test above can fail."""
  batch, other, j = _batch(10), _batch(11), 2
  tokens, after = (
    _compute(config, batch),
    _compute(config, batch, **_edited_behind(batch, other, j)),
  )
  early = batch["review"].step_ids_BxT <= j
  assert not np.allclose(tokens[early], after[early])


CHAINS = Chains(ChainsConfig())
TRUTH = Truth(lambda r: CHAINS.label_steps(r.problem, r.steps, r.truncated), CHAINS.prefix_values)


def _values(name, steps, others, correct):
  prompt = CHAINS.demonstration(3, False)[0]
  requests = [
    Request(f"1/3/{i}", prompt, tuple(s), correct, False) for i, s in enumerate([steps, *others])
  ]
  return open_reviewer(REVIEWERS[name](), TRUTH, None).submit(requests, 1.0).result()[0].values


@pytest.mark.parametrize("name", ["oracle", "noisy", "random", "lexical", "thief", "suffix"])
def test_i7_reviewers_value_a_prefix_without_the_rest(name):
  """All but the control that is made to fail this test."""
  text = CHAINS.demonstration(3, False)[1]
  steps = [part + ";" for part in text.split(";")[:-1]] + [text.split(";")[-1]]
  others = [steps, [*steps[:3], "#0$"]]
  blind = True
  for j in range(1, len(steps) - 1):
    edited = (
      steps[:j] + [steps[0], "a0;", "b9;", "check", "wait"][: len(steps) - 1 - j] + steps[j + 5 :]
    )
    edited = [*edited, "#1$"][: len(steps)]
    ours, theirs = _values(name, steps, others, True), _values(name, edited, others, False)
    blind &= (
      name == "thief" or ours[: j + 1] == theirs[: j + 1]
    )  # Which step the thief likes depends on their number.
  assert blind == (name != "suffix")


# I8: at discount 1 the expected update is the policy gradient, whatever the potential.

SMALL = tree.make_tree(steps=4)


def _cosine(values_NxT):
  return tree.measure(
    SMALL, "", tree.credit(SMALL, SAFE, tree.review(SMALL, values_NxT=values_NxT))
  ).cosine


def test_i8_any_potential_of_the_prefix_leaves_the_expected_update_alone():
  rng, n = np.random.default_rng(0), len(SMALL.reward_N)
  by_prefix = np.stack([np.repeat(rng.random(len(pi)), n // len(pi)) for pi in SMALL.policy], 1)
  checks = (SMALL.actions_NxT == tree.CHECK).cumsum(1) - (SMALL.actions_NxT == tree.CHECK)
  potentials = {
    "random": by_prefix,
    "hostile": 1 - SMALL.value_NxT,
    "performed for": np.clip(SMALL.value_NxT + 0.3 * checks, 0, 1),
    "fails after a check": np.where(checks > 0, np.nan, SMALL.value_NxT),
    "fails at random prefixes": np.where(by_prefix < 0.5, np.inf, by_prefix),
  }
  for values in potentials.values():
    assert _cosine(values) > 1 - 1e-6


def test_i8_a_potential_that_knows_the_rest_does_not():
  total = (SMALL.actions_NxT == tree.CHECK).sum(1, keepdims=True)
  assert _cosine(np.clip(1 - 0.2 * total + 0 * SMALL.value_NxT, 0, 1)) < 0.99
  # Nor one that fails for what the rest says.
  assert _cosine(np.where(total > 1, np.nan, SMALL.value_NxT)) < 0.9999


def _grouped_update(config, values_NxT):
  """Expected update per logit, and the policy gradient: all groups of two of a policy of three
  steps of three actions.

  Credit is what `token_advantages` gives to each group, its baseline and its way
  with missing values included.
  """
  steps, actions = 3, 3
  rng = np.random.default_rng(5)
  traces = np.array(list(itertools.product(range(actions), repeat=steps)))
  n = len(traces)
  policy = [rng.dirichlet(np.full(actions, 2.0), actions**t) for t in range(steps)]
  prefixes = np.stack([np.arange(n) // actions ** (steps - t) for t in range(steps)], 1)
  p = np.prod([policy[t][prefixes[:, t], traces[:, t]] for t in range(steps)], 0)
  rewards = rng.choice(
    np.float32([0, 0.25, 1]), n
  )  # So that the other's reward is like a mean of several.
  # Gradients of log pi by the logits, [N, T, all logits].
  first = np.cumsum([0, *(pi.size for pi in policy)])
  scores = np.zeros((n, steps, first[-1]))
  for i, t in itertools.product(range(n), range(steps)):
    at = first[t] + prefixes[i, t] * actions
    scores[i, t, at : at + actions] = -policy[t][prefixes[i, t]]
    scores[i, t, at + traces[i, t]] += 1
  pairs = np.array(list(itertools.product(range(n), repeat=2)))
  rows = pairs.reshape(-1)
  review = ReviewArrays(
    np.broadcast_to(np.arange(steps, dtype=np.int32), (len(rows), steps)),
    np.zeros((len(rows), steps), np.int32),
    np.ones((len(rows), steps), np.float32),
    values_NxT(traces, prefixes, rng).astype(np.float32)[rows],
    np.ones(len(rows), bool),
  )
  tokens = _jitted(
    config, rewards[pairs], np.full(len(rows), steps, np.int32), np.zeros(len(rows), bool), review
  )
  update = (
    np.einsum(
      "bt,btd,b->d", np.asarray(tokens, float), scores[rows], np.repeat(p[pairs].prod(1), 2)
    )
    / 2
  )
  return update, np.einsum("n,ntd->d", p * rewards, scores)


def _some_value(traces, prefixes, rng):
  return np.stack(
    [rng.random(prefixes[:, t].max() + 1)[prefixes[:, t]] for t in range(prefixes.shape[1])], 1
  )


def _missing_after_action_0(traces, prefixes, rng):
  seen = (traces == 0).cumsum(1) - (traces == 0)
  return np.where(seen > 0, np.nan, _some_value(traces, prefixes, rng))


def _missing_until_action_0(traces, prefixes, rng):
  """The first value never comes, and whether any does depends on the whole trace."""
  seen = (traces == 0).cumsum(1) - (traces == 0)
  return np.where(seen == 0, np.inf, _some_value(traces, prefixes, rng))


def _that_hears_the_rest(traces, prefixes, rng):
  return np.clip(0.2 + 0.3 * (traces == 0).sum(1, keepdims=True) + 0.0 * prefixes, 0, 1)


@pytest.mark.parametrize("log_epsilon", [0.0, 0.01])
@pytest.mark.parametrize("values", [_some_value, _missing_after_action_0, _missing_until_action_0])
def test_i8_with_the_baseline_of_a_real_group_the_update_is_the_policy_gradient(
  values, log_epsilon
):
  """Not only its direction: also its length."""
  update, gradient = _grouped_update(dataclasses.replace(SAFE, log_epsilon=log_epsilon), values)
  np.testing.assert_allclose(update, gradient, atol=1e-6 * np.linalg.norm(gradient))


def test_i8_with_a_real_group_values_that_hear_the_rest_show():
  update, gradient = _grouped_update(SAFE, _that_hears_the_rest)
  assert update @ gradient / np.linalg.norm(update) / np.linalg.norm(gradient) < 0.99


# I9: padding does not pump up the rest.


@pytest.mark.parametrize(
  "config",
  [make(scheme="weighted", conserve="completion", lam=1.0, cap=1000.0), RTG],
  ids=_name,
)
@settings(max_examples=20, deadline=None)
@given(batch=_batches(), after=st.integers(0, K - 2), tokens=st.integers(1, 6), data=st.data())
def test_i9_tokens_without_credit_leave_the_others_as_they_were(config, batch, after, tokens, data):
  """Of `weighted` the part that follows the review, and where no cap bites:
  its uniform part is spread over all."""
  batch["lengths"] = np.minimum(batch["lengths"], T - 6)
  ids, roles, weights, _, ok = batch["review"]
  np.minimum(ids, K - 2, out=ids)
  batch["rewards"][:] = 0
  batch["rewards"][0, 0] = 0.75
  # The first step earns, so that something stands out; no weight so small that it counts as none.
  roles[0, 0], ok[0] = NECESSARY, True
  weights[0] = data.draw(hnp.arrays(np.float32, K, elements=st.floats(0.125, 8, width=32)))
  after = min(after, int(ids[0, batch["lengths"][0] - 1]))
  role = data.draw(st.sampled_from([INHERITS, IRRELEVANT]))
  probed = _with_probe(batch, 0, after, role, 1.0, 0.5, tokens)
  short, long = _compute(config, batch), _compute(config, probed)
  probe = (probed["review"].step_ids_BxT[0] == after + 1) & _mask(probed)[0]
  kept = np.flatnonzero(_mask(probed)[0] & ~probe)
  # Multipliers are quotients of sums of different length.
  np.testing.assert_allclose(long[0, kept], short[0, : batch["lengths"][0]], rtol=2e-6, atol=1e-6)
  if config.scheme == "weighted":
    assert not np.abs(long[0, probe]).max() > 1e-5
    assert np.array_equal(long[1:], short[1:])


# I10: groups without variance.


@pytest.mark.parametrize("reward", [0.0, 0.25, 1.0])
@settings(max_examples=12, deadline=None)
@given(batch=_batches())
def test_i10_where_all_rewards_are_equal_only_signed_moves_tokens_and_its_sum_is_zero(
  reward, batch
):
  batch["rewards"][:] = reward
  for config in (make(), *(c for c in CONFIGS if c.scheme == "weighted")):
    assert not _compute(config, batch).any()
  for config in (c for c in CONFIGS if c.scheme == "signed"):
    tokens = _compute(config, batch).astype(float)
    assert (np.abs(tokens.sum(1)) <= 1e-6 * np.abs(tokens).sum(1) + TINY).all()


@pytest.mark.parametrize("baseline", ["leave_one_out", "mean"])
@settings(max_examples=12, deadline=None)
@given(batch=_batches())
def test_i10_return_to_go_is_zero_where_all_fail(baseline, batch):
  batch["rewards"][:] = 0
  assert not _compute(dataclasses.replace(RTG, baseline=baseline), batch).any()


@pytest.mark.parametrize("config", [SIGNED, CAPO], ids=_name)
@settings(max_examples=20, deadline=None)
@given(batch=_batches())
def test_i10_where_all_fail_the_end_of_an_answer_is_never_blamed(config, batch):
  """Else nothing would restore it: it has at least what a step has that nobody blames."""
  batch["rewards"][:], batch["truncated"][:] = 0, False
  batch["review"].roles_BxK[:, 0] = IRRELEVANT
  tokens, rows = _compute(config, batch), np.arange(B)
  end = tokens[rows, batch["lengths"] - 1]
  assert (end >= tokens[:, 0] - 1e-5 * (1 + np.abs(tokens).max(1))).all()


# I11: a missing review is that completion's alone.


@pytest.mark.parametrize("config", [WEIGHTED, SIGNED, *POTENTIALS, RTG, CAPO], ids=_name)
@settings(max_examples=12, deadline=None)
@given(batch=_batches(), ok=hnp.arrays(bool, B))
def test_i11_a_missing_review_is_uniform_for_that_completion(config, batch, ok):
  ok &= batch["review"].ok_B
  tokens = _compute(config, batch, ok_B=ok)
  assert np.array_equal(tokens[~ok], _uniform(config, batch)[~ok])
  if config.scheme not in ("return_to_go", "capo"):
    assert np.array_equal(tokens[ok], _compute(config, batch)[ok])


@settings(max_examples=12, deadline=None)
@given(batch=_batches(), ok=hnp.arrays(bool, B))
def test_i11_return_to_go_expects_even_pay_of_a_missing_review(batch, ok):
  """To the others it is a completion whose tokens all earn the same."""
  ok &= batch["review"].ok_B & _usable(batch)
  even = {name: getattr(batch["review"], name).copy() for name in ("roles_BxK", "weights_BxK")}
  even["roles_BxK"][~ok], even["weights_BxK"][~ok] = NECESSARY, 1.0
  tokens, theirs = (
    _compute(RTG, batch, ok_B=ok),
    _compute(RTG, batch, ok_B=np.ones(B, bool), **even),
  )
  assert np.array_equal(tokens[ok], theirs[ok])


@settings(max_examples=12, deadline=None)
@given(batch=_batches(), ok=hnp.arrays(bool, B))
def test_i11_capo_leaves_a_missing_review_out_of_the_mean(batch, ok):
  ok &= batch["review"].ok_B & _usable(batch)
  batch["review"] = batch["review"]._replace(ok_B=ok)
  blame = _blame_by_hand(CAPO, batch)
  others = _others_blame(blame, batch, ok)[:, None]
  wanted = np.where(_mask(batch), _uniform(CAPO, batch) - CAPO.penalty * (blame - others), 0)
  np.testing.assert_allclose(
    _compute(CAPO, batch)[ok], wanted[ok], rtol=1e-6, atol=1e-6 * (1 + blame.max())
  )


# I12: what a cap takes it gives back.


@pytest.mark.parametrize("conserve", ["tokens", "completion"])
@pytest.mark.parametrize(("scheme", "caps"), [("weighted", (1.0, 1.5)), ("signed", (0.0, 0.05))])
@settings(max_examples=20, deadline=None)
@given(batch=_batches(), rare=st.integers(0, 11))
def test_i12_the_sum_stays_where_a_cap_bites(scheme, caps, conserve, batch, rare):
  # One token of each first completion stands out, by more than the caps allow.
  lengths, ids = batch["lengths"], batch["review"].step_ids_BxT
  rows = np.arange(0, B, G)
  lengths[rows] = np.maximum(lengths[rows], 12)
  ids[rows], batch["rewards"][:, 0], batch["rewards"][:, 1:] = 0, 1, 0
  ids[rows, rare] = 1
  for array, value in (
    (batch["review"].roles_BxK, [INHERITS, NECESSARY]),
    (batch["review"].weights_BxK, [1.0, 1.0]),
  ):
    array[rows, :2] = value
  batch["review"].ok_B[rows] = True
  for cap in caps:
    config = make(scheme=scheme, conserve=conserve, cap=cap, lam=1.0, beta=3.0)
    tokens, advantages = (
      x.astype(float) for x in (_compute(config, batch), _uniform(config, batch))
    )
    mass = advantages[:, 0] * lengths
    assert (np.abs(tokens.sum(1) - mass) <= 1e-6 * np.abs(tokens).sum(1) + TINY).all()
    peak = (
      tokens[rows, rare] / advantages[rows, 0]
      if scheme == "weighted"
      else (tokens - advantages)[rows, rare]
    )
    np.testing.assert_allclose(peak, cap, rtol=1e-5, atol=1e-6)


# What the policy did not write has no place in credit.

GAPPED = [*CONFIGS, *POTENTIALS, RTG, CAPO, make(), make(conserve="completion", baseline="mean")]
GAPPED += [dataclasses.replace(config, baseline="mean") for config in (RTG, CAPO)]


@pytest.mark.parametrize("config", GAPPED, ids=_name)
def test_gaps_between_turns_change_no_sampled_tokens_credit(config):
  for seed in range(4):
    batch, rng = _batch(seed), np.random.default_rng(seed)
    batch["rewards"] = rng.integers(0, 9, (P, G)).astype(np.float32) / 8
    batch["lengths"] = rng.integers(1, T - 3, B).astype(np.int32)
    batch["review"].ok_B[::5] = False
    batch["review"].weights_BxK[:] = rng.random((B, K)) * 3
    batch["review"].values_BxK[rng.random((B, K)) < 0.2] = np.nan
    sampled, ids = np.zeros((B, T), bool), rng.integers(0, K, (B, T)).astype(np.int32)
    for i, n in enumerate(batch["lengths"]):
      sampled[i, np.sort(rng.choice(T, n, replace=False))] = True
      ids[i, sampled[i]] = batch["review"].step_ids_BxT[i, :n]
    gapped = _gapped(
      config,
      batch["rewards"],
      sampled,
      batch["truncated"],
      batch["review"]._replace(step_ids_BxT=ids),
    )
    plain = _compute(config, batch)
    assert not np.asarray(gapped)[~sampled].any()
    for i, n in enumerate(batch["lengths"]):
      ours, theirs = np.asarray(gapped)[i, sampled[i]], plain[i, :n]
      # Sums over a row with gaps are rounded in another order.
      np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-6 * max(1, np.abs(theirs).max()))


_gapped = jax.jit(token_advantages, static_argnums=0)

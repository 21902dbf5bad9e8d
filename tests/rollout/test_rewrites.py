"""Rewrites: the policy bears them out, and whoever proposes them may say anything."""

import contextlib
import dataclasses
import itertools
import json
import string

import numpy as np
import pytest
from fake_server import FakeServer
from test_prefixes import SAMPLER, TASK, TOKENIZER, Batch, T
from test_spot import named, policy

from dca_jax.episode import Episode, Outcome, Review, Rewrite
from dca_jax.errors import UserError
from dca_jax.review.client_config import ClientConfig
from dca_jax.review.rewriter import FromModel, FromOracle, Omission, Proposing
from dca_jax.review.types import Request, Share, Truth
from dca_jax.rollout.prefixes import Further, Spent
from dca_jax.rollout.rewrites import drawn, forked, rows_of_rewrites, verified
from dca_jax.tasks.tokenizer import text_of

TEXTS = ["a1;b1;#1$", "b0;b0;#0$", "a0;#1$", "b1;#1"]  # Of a problem whose answer is 0.


def fork_of(text, keep, said, correct):
  """What is forced, from which letter on it is new, and what the answer had there."""
  episode = Batch(1, texts=[text]).episodes[0]
  episode = dataclasses.replace(episode, outcome=Outcome(float(correct), correct, False))
  if fork := forked(SAMPLER, episode, keep, said):
    return text_of(TOKENIZER, fork.forced), fork.start, text_of(TOKENIZER, fork.own)


def test_a_correction_is_forced_as_a_step_and_a_shortcut_as_a_token():
  # The step in which the correction differs, and nothing of what was proposed behind it.
  assert fork_of("a1;b0;#0$", 1, "b1;#1", False) == ("a1;b1;", 4, "a1;b0")
  # What is said again of the answer itself is no news.
  assert fork_of("a1;b0;#0$", 0, "a1;b0;#1$", False) == ("a1;b0;#1", 7, "a1;b0;#0")
  # Of a right answer only the token with which it is left, and that of its own in that place.
  assert fork_of("a1;b1;#1$", 0, "b1;#1$", True) == ("b", 0, "a")
  assert fork_of("b1;b1;#1$", 0, "b1;#1$", True) == ("b1;#", 3, "b1;b")
  assert fork_of("b1;#1$", 1, "$", True) is None  # Nobody ends an answer for the policy.


LIES = [
  (0, ""),
  (0, "a1;b1;#1$"),  # The answer itself.
  (0, "a1;b1"),
  (1, "$$$"),
  (0, "<|im_end|><eos>$</s>"),
  (0, "東京 🙂 \ud800 \x00" + string.printable),
  (2, "#" * 10_000_000),
  (0, "a1;" * 1000),
  (0, "+1a*0b?aa0b1;"),  # Another problem.
  (2, '{"keep": 0}'),
  (0, "a0;b0;#0$"),
]


def test_no_lie_becomes_more_than_an_answer_that_the_policy_was_right_with():
  """Sixteen proposals, as many as a small run's episodes; what is kept ends right, in the policy's
  own words."""
  batch = Batch(1, texts=TEXTS * 4)
  rewards = [float(TASK.verify(batch.problems[0], text, False).correct) for text in TEXTS]
  assert {0.0, 1.0} == set(rewards)
  episodes = named(batch, rewards * 4).episodes
  said = [Review("ok", rewrite=said) for said in (*LIES, *[(0, "b0;")] * 5)]
  checked = [r.checked(len(e.steps)) for r, e in zip(said, episodes, strict=True)]
  after, made = verified(1, policy(batch), batch.rollout, checked)
  assert [dataclasses.replace(e, rewrite=None) for e in after.episodes] == episodes
  assert made.proposed < len(episodes)
  assert made.spent.tokens <= made.proposed * 2 * T
  kept = [e for e in after.episodes if e.rewrite]
  for episode in kept:
    r = episode.rewrite
    assert len(r.tokens) <= T
    assert 0 <= r.start < r.forced < len(r.tokens)
    assert not set(TOKENIZER.all_special_ids) & set(r.tokens[: r.forced])
    assert TASK.verify(episode.problem, r.text, False).correct
    if episode.outcome.correct:
      assert len(r.tokens) < len(episode.tokens)
      assert np.mean(r.after) >= np.mean(r.before)
    line = json.loads(json.dumps(episode.to_json()))
    assert Episode.from_json(line).rewrite == r
  assert kept


def test_a_shortcut_that_the_policy_fails_at_is_not_kept(monkeypatch):
  """Answers from the token that the answer had, and from the one in its place."""
  batch = named(Batch(1, texts=["a1;b1;#1$"] * 2), [1.0, 1.0])
  says = [Review("ok", rewrite=(0, "b1;#1$"))] * 2

  def kept(before, after, written="1;#1$"):
    tokens = np.array(TOKENIZER(written, add_special_tokens=False)["input_ids"], np.int32)

    def answers(policy, rollout, begun, n):
      assert [text_of(TOKENIZER, np.frombuffer(p.tokens, np.int32)) for p in begun] == ["b", "a"]
      made = [[Further(tokens, Outcome(x, bool(x), False)) for x in xs] for xs in (after, before)]
      return made, Spent(7)

    monkeypatch.setattr("dca_jax.rollout.rewrites.continued", answers)
    rollout, made = verified(2, policy(batch), batch.rollout, says)
    assert made == (2, Spent(7))
    return rollout.episodes[0].rewrite

  assert kept([1.0, 0.0], [1.0, 0.0]).text == "b1;#1$"
  assert kept([1.0, 1.0], [1.0, 0.0]) is None
  assert kept([0.0, 0.0], [0.0, 0.0]) is None  # As good, and still wrong.
  assert kept([1.0, 0.0], [1.0, 0.0], "1;b1;b1;#1$") is None  # No shorter.


@dataclasses.dataclass(frozen=True)
class Raises(Proposing):
  rows: int = 2

  def propose(self, request, truth):
    return [1 // 0, (0, "a"), "no"][int(request.id[-1])]


def test_who_is_asked_and_what_becomes_of_the_answers():
  batch = named(Batch(1, texts=TEXTS), [1.0, 0.0, 0.0, 0.0])
  for rewriter, most in ((FromOracle(), 1), (FromOracle(rows=2), 2), (Omission(rows=4), 1)):
    chosen = [drawn(rewriter, seed, batch.episodes, 4) for seed in range(30)]
    assert {sum(c) for c in chosen} == {most}
    assert all(
      rewriter.improves(e.outcome.correct)
      for c in chosen
      for e in itertools.compress(batch.episodes, c)
    )
  assert len({tuple(drawn(FromOracle(), seed, batch.episodes, 4)) for seed in range(30)}) == 3
  # More than a group has room for is never asked about, so never learnt.
  text = Rewrite((3, 1, 0), 1, 2, "", (), (1.0,))
  full = [
    dataclasses.replace(e, rewrite=text if k in (1, 2) else None)
    for k, e in enumerate(batch.episodes)
  ]
  tokens, weights = rows_of_rewrites(FromOracle(rows=3, forced_weight=4.0, weight=0.5), full, 4, T)
  assert tokens.shape == weights.shape == (3, T)
  assert tokens[:2, :3].tolist() == [[3, 1, 0]] * 2
  assert weights[:, :4].tolist() == [[0, 4, 0.5, 0]] * 2 + [[0] * 4]


def test_a_proposal_that_fails_is_counted():
  opened = Raises().open(Truth.of(TASK), None, None)
  requests = [
    dataclasses.replace(Request.of(Batch(1, texts=TEXTS).episodes[0]), id=f"1/2/{i}")
    for i in range(3)
  ]
  said = opened.submit(requests, 20.0).result(25)
  assert [review.status for review in said] == ["client_error"] * 3
  opened.close()


def test_what_the_built_in_ones_say():
  truth, prompt = Truth.of(TASK), TASK.problem("train", 0).prompt
  request = Request("1/0/0", prompt, ("a1;", "b1;", "#1$"), False, False)
  assert FromOracle().propose(request, truth) == (1, "b0;")
  lucky = dataclasses.replace(request, steps=("a1;", "b0;", "#0$"), correct=True)
  assert FromOracle().propose(lucky, truth) is None
  said = {Omission(seed=seed).propose(lucky, truth) for seed in range(20)}
  assert said == {(0, "b0;#0$"), (1, "#0$")}
  assert Omission().propose(dataclasses.replace(lucky, steps=("#0$",)), truth) is None


def test_a_language_model_is_asked_once(tmp_path, monkeypatch):
  monkeypatch.setenv("GEMINI_API_KEY", "k")
  asked = [Request(f"1/0/{i}", "1 + 1?", ("2;", "#2"), True, False) for i in range(2)]
  reply = {"keep": 1, "text": "#2"}
  with FakeServer(reply=lambda data: reply) as server:
    client = ClientConfig(base_url=server.url)
    said = []
    for keep in (1, 0):  # The second time a cached reply says what the first one said.
      reply["keep"] = keep
      rewriter = FromModel(client=client).open(Truth(None, None), tmp_path / "kept", Share())
      with contextlib.closing(rewriter):
        said.append(rewriter.submit(asked, 20.0).result(25))
    assert [review.rewrite for reviews in said for review in reviews] == [(1, "#2")] * 4
    assert len(server.requests) == 1  # The two answers are the same.
    reply["keep"] = 2
    with contextlib.closing(FromModel(client=client).open(Truth(None, None), None, Share())) as one:
      assert one.submit(asked[:1], 20.0).result(25)[0].status == "malformed"
  assert "rewrite.client.model: no price" in message_of(FromModel(client=ClientConfig(model="x")))


def message_of(rewriter):
  with pytest.raises(UserError) as raised:
    rewriter.open(Truth(None, None), None, Share())
  return str(raised.value)

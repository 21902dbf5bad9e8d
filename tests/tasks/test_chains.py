"""The task `chains`: problems, tokenizer, demonstrations, verifier,
and the step labels against brute force."""

import collections
import functools
import itertools
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dca_jax.episode import ROLES
from dca_jax.rollout import cut
from dca_jax.tasks import Chains, ChainsConfig, Problem

# Problems and tokenizer.


def test_problems_are_a_function_of_split_and_index():
  one, other = Chains(ChainsConfig()), Chains(ChainsConfig())
  backwards = [other.problem("train", i) for i in reversed(range(50))]
  assert [one.problem("train", i) for i in range(50)] == backwards[::-1]
  assert one.problem("train", 7) == one.problem("train", 7)
  assert len({one.problem("train", i).prompt for i in range(200)}) == 200


def test_splits_share_no_problem():
  task = Chains(ChainsConfig())
  prompts = [
    {task.problem(split, i).prompt for i in range(300)}
    for split in ("train", "heldout", "demonstrations")
  ]
  assert all(not a & b for a, b in itertools.combinations(prompts, 2))
  assert len(set.union(*prompts)) == 900


@pytest.mark.parametrize("lines", range(2, 25, 2))
def test_prompt_length_and_answer(lines):
  task = Chains(ChainsConfig(lines=lines))
  for i in range(20):
    problem = task.problem("train", i)
    assert len(problem.prompt) == 3 * lines + 7
    assert problem.answer == str(_fill(_read(problem.prompt, 10), {})[-1])


def test_both_chains_are_queried_and_every_operation_occurs():
  task = Chains(ChainsConfig(lines=4))
  prompts = [task.problem("train", i).prompt for i in range(100)]
  assert {prompt[13] for prompt in prompts} == {"c", "d"}
  assert set("+-*") <= set("".join(prompts))


@pytest.mark.parametrize("lines", [2, 12, 24])
def test_tokenizer_has_one_token_a_character(lines, tmp_path):
  task = Chains(ChainsConfig(lines=lines))
  tokenizer = task.tokenizer()
  assert tokenizer.eos_token == "$"
  tokenizer.save_pretrained(tmp_path)
  loaded = AutoTokenizer.from_pretrained(tmp_path)
  assert (loaded.eos_token_id, loaded.pad_token_id) == (
    tokenizer.eos_token_id,
    tokenizer.pad_token_id,
  )
  for i in range(20):
    for text in ("".join(task.demonstration(i, True)), "?a;;#*$"):
      ids = tokenizer(text)["input_ids"]
      assert len(ids) == len(text)
      assert tokenizer.decode(ids) == text
      assert tokenizer.batch_decode([[token] for token in ids]) == list(text)
      assert loaded(text)["input_ids"] == ids
      assert loaded.decode(ids) == text
      assert [token == tokenizer.eos_token_id for token in ids] == [c == "$" for c in text]


# Demonstrations and verifier.


@pytest.mark.parametrize("wrong", ["table", "slips"])
def test_demonstrations_without_mistakes_are_right_throughout(wrong):
  task = Chains(ChainsConfig(wrong=wrong))
  seen = set()
  for i in range(500):
    prompt, completion = task.demonstration(i, False)
    assert task.verify(_problem(task, prompt), completion, truncated=False).correct
    roles = task.label_steps(prompt, _cut(completion), truncated=False)
    assert roles[-1] == "necessary"
    seen.update(roles)
  assert seen == {"necessary", "irrelevant", "redundant"}


def test_demonstrations_with_mistakes_are_seldom_right():
  task = Chains(ChainsConfig())
  correct = 0
  for i in range(2000):
    prompt, completion = task.demonstration(i, True)
    correct += task.verify(_problem(task, prompt), completion, truncated=False).correct
  # Six of the steps matter, and a quarter of all table entries is wrong on average: 0.75**6, and
  # lucky guesses.
  assert 0.2 <= correct / 2000 <= 0.35


def test_the_table_is_wrong_in_the_same_way_every_time():
  """A misconception is a fixed function of the operation and its operands:
  at most one wrong value for each."""
  task = Chains(ChainsConfig(drop=0.0, repeat=0.0))
  wrong_values: dict[tuple, set[int]] = {}
  for i in range(500):
    prompt, completion = task.demonstration(i, True)
    written = {step[0]: int(step[1]) for step in _cut(completion)[:-1]}
    written.update({prompt[-5]: int(prompt[-4]), prompt[-3]: int(prompt[-2])})
    above = [prompt[-5], prompt[-3]]
    for n, (symbol, y, label) in enumerate(zip(*[iter(prompt[:36])] * 3, strict=True)):
      x = written[above[n % 2]]
      if written[label] != _apply(symbol, x, int(y), 10):
        wrong_values.setdefault((symbol, x, y), set()).add(written[label])
      above[n % 2] = label
  assert all(len(values) == 1 for values in wrong_values.values())
  assert (
    len(wrong_values) > 150
  )  # Three quarters of 300 entries are sometimes wrong, and most have come up.


def test_slips_are_not_the_same_every_time():
  task = Chains(ChainsConfig(wrong="slips", wrong_low=0.2, wrong_high=0.2))
  demonstrations = [task.demonstration(i, True) for i in range(500)]
  correct = [
    task.verify(_problem(task, prompt), text, truncated=False).correct
    for prompt, text in demonstrations
  ]
  # Six steps with a slip of 20 % each leave 0.8 ** 6 = 26 % without one; a product by zero forgives
  # some more.
  assert 0.2 < sum(correct) / 500 < 0.45
  roles = {
    role for prompt, text in demonstrations for role in task.label_steps(prompt, _cut(text), False)
  }
  assert {"error", "inherits", "necessary"} <= roles
  assert demonstrations == [task.demonstration(i, True) for i in range(500)]


@pytest.mark.parametrize("wrong", ["table", "slips"])
@pytest.mark.parametrize("repeat", [0.12, 1.0])
def test_demonstrations_repeat_at_most_two_lines_and_stay_short(wrong, repeat):
  task = Chains(ChainsConfig(wrong=wrong, repeat=repeat))
  most = 0
  for i in range(500):
    _, completion = task.demonstration(i, True)
    steps = _cut(completion)
    assert "".join(steps) == completion
    repeated = sum(a == b for a, b in itertools.pairwise(steps))
    assert (
      len({step[0] for step in steps}) == len(steps) - repeated
    )  # Repeats are adjacent, and of whole lines.
    assert len(completion) <= 48
    most = max(most, repeated)
  assert most == 2


def test_drop_leaves_out_only_lines_of_the_distractor():
  task = Chains(ChainsConfig(drop=1.0, repeat=0.0))
  for i in range(50):
    prompt, completion = task.demonstration(i, False)
    assert [step[0] for step in _cut(completion)[:-1]] == _read(prompt, 10).labels[1:]


def test_verifier():
  task = Chains(ChainsConfig())
  problem = task.problem("train", 0)
  right, wrong = f"#{problem.answer}$", f"#{(int(problem.answer) + 1) % 10}$"
  for text, correct in (
    (right, True),
    (f"a0;{right}", True),
    (wrong, False),
    (right + wrong, False),
    ("", False),
  ):
    outcome = task.verify(problem, text, truncated=False)
    assert (outcome.correct, outcome.reward, outcome.truncated) == (correct, float(correct), False)
  for text in (
    right[:-1],
    f"{right}a",
    f"{right}\n",
    f"{right}$",
    f"#1{right[1:]}",
    problem.answer,
    f"# {right[1:]}",
  ):
    assert not task.verify(problem, text, truncated=False).correct
  cut_off = task.verify(problem, right, truncated=True)
  assert (cut_off.correct, cut_off.reward, cut_off.truncated) == (False, 0.0, True)
  assert task.final_answer(wrong) == wrong[1]
  assert task.final_answer("a1;#1") is None


# The labels. Small tasks, so that every completion can be tried: their prompts, and steps to build
# them from.


def _writes(labels: str, modulus: int) -> list[str]:
  return [f"{label}{value};" for label in labels for value in range(modulus)]


TASKS = {
  "two values": (2, 4, ["+1a+1b-1c*1d?cm1n0;", "*0a+1b+1c*1d?cm1n1;"], [*_writes("mac", 2), "d1;"]),
  "two values, longer chain": (2, 4, ["+1a+1b-1c*1d+1e*0f?em0n0;"], [*_writes("ace", 2)]),
  "odd lines": (
    2,
    3,
    ["+1a+1b-1c*1d?dm1n0;"],
    [*_writes("nbd", 2), "a1;", "a7;", "z1;", "#1$", "b1", ";"],
  ),
  "three values": (
    3,
    3,
    ["+2a+1b*2c*1d?cm2n0;", "-1a+1b*0c*1d?cm0n0;"],
    [*_writes("mac", 3), "n1;", "ac1;"],
  ),
}


def _completions(name):
  """(task, prompt, steps, truncated) for every completion, with and without an answer,
  that a small task allows."""
  modulus, longest, prompts, alphabet = TASKS[name]
  for prompt in prompts:
    task = Chains(ChainsConfig(lines=prompt.index("?") // 3, modulus=modulus))
    for count in range(longest + 1):
      for body in itertools.product(alphabet, repeat=count):
        for ending in (*(f"#{value}$" for value in range(modulus)), "$", "a1#0$"):
          yield task, prompt, (*body, ending), False
        yield task, prompt, (*body, "a"), True
        # A finished last step that is no write, cut off right after it: see the test of its own
        # below.
        if body and re.fullmatch(r"[a-z]\d;", body[-1]):
          yield task, prompt, body, True
          yield task, prompt, body, False


@functools.cache
def _labelled(name):
  return [(*case, task.label_steps(*case)) for task, *case in _completions(name)]


@pytest.mark.parametrize("name", TASKS)
def test_labels_equal_brute_force(name):
  modulus, cases = TASKS[name][0], _labelled(name)
  assert len(cases) > 2000
  seen = set()
  for prompt, steps, truncated, roles in cases:
    assert roles == _independent_labels(prompt, modulus, steps, truncated), (
      prompt,
      steps,
      truncated,
    )
    seen.update(roles)
  assert seen == set(ROLES)


@pytest.mark.parametrize("name", TASKS)
def test_the_role_of_an_answer_is_its_verdict(name):
  modulus = TASKS[name][0]
  for prompt, steps, _truncated, roles in _answered(name):
    correct = int(steps[-1][-2]) == _fill(_read(prompt, modulus), {})[-1]
    assert correct == (roles[-1] in ("necessary", "repair")), (prompt, steps)
    if not correct:
      # Nothing goes wrong by itself: a wrong answer is an error or inherits one.
      assert "error" in roles, (prompt, steps)
      assert roles[-1] == "error" or any(role == "error" for role in roles[:-1]), (prompt, steps)


@pytest.mark.parametrize("name", TASKS)
def test_without_an_error_nothing_is_inherited_or_repaired(name):
  for _prompt, steps, _truncated, roles in _labelled(name):
    if "error" not in roles:
      assert not {"inherits", "repair"} & set(roles), steps
    for k, role in enumerate(roles):
      if role in ("inherits", "repair"):
        assert "error" in roles[:k], steps


@pytest.mark.parametrize("name", TASKS)
def test_true_values_instead_of_wrong_ones_make_the_answer_right(name):
  modulus = TASKS[name][0]
  for prompt, steps, truncated, roles in _answered(name):
    if "error" not in roles:
      continue
    reading, task = _read(prompt, modulus), _task(name, prompt)
    true = dict(zip(reading.labels, _fill(reading, {}), strict=True))
    fixed = [
      f"{s[0]}{true[s[0]]};" if re.fullmatch(r"[a-z]\d;", s) and s[0] in true else s
      for s in steps[:-1]
    ]
    fixed.append(f"#{true[reading.labels[-1]]}$")
    changed = task.label_steps(prompt, fixed, truncated)
    assert changed[-1] == "necessary", (prompt, fixed)
    # Only what is no write to a line of the prompt is still wrong.
    assert all(
      role != "error" or not re.fullmatch(r"[a-y]\d;", s)
      for s, role in zip(fixed, changed, strict=True)
    )
    assert not {"inherits", "repair"} & set(changed), (prompt, fixed)


@pytest.mark.parametrize("name", TASKS)
def test_a_correction_is_right_where_it_stands(name):
  corrected = 0
  for prompt, steps, _truncated, roles in _labelled(name)[::11]:
    task, k = _task(name, prompt), roles.index("error") if "error" in roles else -1
    if k >= 0 and (said := task.correct_step(prompt, steps, k)):
      begun = (*steps[:k], said + "$" * said.startswith("#"))
      role = task.label_steps(prompt, begun, not said.startswith("#"))[-1]
      assert role in ("necessary", "redundant"), (prompt, steps, said)
      assert re.fullmatch(r"[a-z]\d;|#\d", said), (prompt, steps, said)
      corrected += 1
  assert corrected > 50


@pytest.mark.parametrize("name", TASKS)
def test_needless_steps_can_be_deleted(name):
  """Without its redundant and irrelevant steps an answer has the same role.

  So have all other steps where nothing is wrong. A wrong step may change: an error that overwrites
  a true value nobody read is the same error twice without that value, and the second time it is
  redundant.
  """
  for prompt, steps, truncated, roles in _answered(name):
    kept = [k for k, role in enumerate(roles) if role not in ("redundant", "irrelevant")]
    if len(kept) == len(steps):
      continue
    assert kept[-1] == len(steps) - 1
    shorter = _task(name, prompt).label_steps(prompt, [steps[k] for k in kept], truncated)
    assert shorter[-1] == roles[-1], (prompt, steps)
    if not {"error", "inherits"} & set(roles):
      assert shorter == [roles[k] for k in kept], (prompt, steps)


@pytest.mark.parametrize("name", ["two values", "odd lines"])
def test_a_needless_step_changes_no_other_role(name):
  """Neither a write to the other chain nor rewriting what stands, wherever it is put in."""
  modulus = TASKS[name][0]
  for prompt, steps, truncated, roles in _labelled(name)[::11]:
    task, reading = _task(name, prompt), _read(prompt, modulus)
    board = {reading.labels[0]: reading.start}
    for k in range(len(steps)):
      insertions = [(f"{reading.other}0;", "irrelevant")]
      insertions += [(f"{label}{value};", "redundant") for label, value in board.items()]
      for step, role in insertions:
        longer = task.label_steps(prompt, [*steps[:k], step, *steps[k:]], truncated)
        assert longer == [*roles[:k], role, *roles[k:]], (prompt, steps, step, k)
      if re.fullmatch(r"[a-z]\d;", steps[k]) and steps[k][0] in reading.labels:
        board[steps[k][0]] = int(steps[k][1])


@pytest.mark.parametrize("name", ["two values", "three values"])
def test_what_follows_decides_only_whether_a_true_step_is_needed(name):
  later = ("necessary", "repair", "redundant")
  for prompt, steps, truncated, roles in _labelled(name)[::7]:
    for k in range(1, len(steps)):
      prefix = _task(name, prompt).label_steps(prompt, steps[:k], False)
      for a, b in zip(prefix, roles[:k], strict=True):
        assert a == b or (a in later and b in later and "redundant" in (a, b)), (
          prompt,
          steps,
          truncated,
        )


def test_labels_by_hand():
  task = Chains(ChainsConfig(lines=4))
  prompt = "+3a*2b-4c+1d?cm7n3;"  # a = 0, c = 6, b = 6, d = 7
  for text, roles in (
    ("a0;c6;#6$", "necessary necessary necessary"),
    ("#6$", "necessary"),
    ("c6;#6$", "necessary necessary"),
    ("c6;a0;#6$", "necessary redundant necessary"),
    ("a0;b6;d9;c6;#6$", "necessary irrelevant irrelevant necessary necessary"),
    ("a0;a0;c6;#6$", "necessary redundant necessary necessary"),
    ("m7;a0;c6;#6$", "redundant necessary necessary necessary"),
    ("a1;c7;#7$", "error inherits inherits"),
    ("a1;c6;#6$", "error repair necessary"),
    ("a1;a0;c6;#6$", "error repair necessary necessary"),
    ("a1;c7;a0;c6;#6$", "error inherits repair repair necessary"),
    ("a1;c7;#6$", "error inherits repair"),
    ("a0;c6;#7$", "necessary necessary error"),
    ("a0;c6;?c;#6$", "necessary necessary error necessary"),
    ("a0;z6;#6$", "necessary error necessary"),
    ("a0;c6;$", "necessary necessary error"),
  ):
    assert task.label_steps(prompt, _cut(text), truncated=False) == roles.split(), text
  assert task.label_steps(prompt, ["a0;", "c6;", "#6"], truncated=True) == [
    "necessary",
    "necessary",
    "irrelevant",
  ]
  assert task.label_steps(prompt, [], truncated=False) == []


def test_a_finished_last_step_that_says_nothing_is_an_error_also_when_cut_off():
  """Only an unfinished step is excused by the end of the tokens; this one has its `;`."""
  task = Chains(ChainsConfig(lines=4))
  assert task.label_steps("+3a*2b-4c+1d?cm7n3;", ["a0;", "?c;"], truncated=True) == [
    "necessary",
    "error",
  ]


# Values of prefixes.


def _perturbed(task, index, dice):
  """A demonstration of a problem with steps dropped, repeated and overwritten."""
  prompt, text = task.demonstration(index, True)
  steps = []
  for step in _cut(text):
    if dice.random() < 0.1:
      continue
    if step[-1] == ";" and dice.random() < 0.15:
      step = f"{step[0]}{dice.randrange(task.config.modulus)};"
    steps += [step] * (1 + (dice.random() < 0.1))
  return prompt, steps or ["#0$"]


def _independent_values(task, prompt, completions):
  """The place that steps got to (or -1) as a function, the furthest of each completion, and the
  number of places."""
  reading = _read(prompt, task.config.modulus)
  true = _fill(reading, {})[-1]

  def depth(steps):
    board = {}
    for step in steps:
      if re.fullmatch(r"[a-z]\d;", step) and step[0] in reading.labels:
        board[reading.labels.index(step[0])] = int(step[1])
    at = max(board, default=0)
    return at if _fill(reading, {at: board[at]} if board else {})[-1] == true else -1

  end = len(reading.labels)
  furthest = [
    end if steps[-1].endswith(f"#{true}$") else max(depth(steps[:k]) for k in range(len(steps)))
    for steps in completions
  ]
  return depth, furthest, end


def test_prefix_values_equal_an_independent_count():
  task, dice = Chains(ChainsConfig(lines=6)), random.Random(0)
  seen = set()
  for index in range(40):
    prompt, _ = task.demonstration(index, True)
    completions = [_perturbed(task, index, dice)[1] for _ in range(8)]
    depth, furthest, end = _independent_values(task, prompt, completions)
    for i, (steps, values) in enumerate(
      zip(completions, task.prefix_values(prompt, completions), strict=True)
    ):
      assert len(values) == len(steps)
      others = furthest[:i] + furthest[i + 1 :]
      for k, value in enumerate(values):
        at = depth(steps[:k])
        wanted = float(at >= 0)
        for j in range(max(at, 0), end):
          wanted *= (sum(f > j for f in others) + 0.5) / (sum(f >= j for f in others) + 1)
        assert value == pytest.approx(wanted)
        assert 0 <= value < 1
        seen.add(at)
  assert {-1, 0, 1, 2, 3} <= seen


def test_prefix_values_by_hand():
  task = Chains(ChainsConfig(lines=4))
  prompt = "+3a*2b-4c+1d?cm7n3;"  # a is 0, c is 6
  right = ["a0;", "c6;", "#6$"]
  # One other, who succeeded: from each of the three places one of one got further.
  assert task.prefix_values(prompt, [right, right])[0] == pytest.approx([0.75**3, 0.75**2, 0.75])
  # A wrong value stands, and then a right one.
  assert task.prefix_values(prompt, [["a1;", "a0;", "c6;", "#6$"], right])[0][1:3] == pytest.approx(
    [0, 0.75**2]
  )
  # The distractor changes nothing.
  assert task.prefix_values(prompt, [["b0;", "d5;", "a0;", "#6$"], right])[0][:3] == pytest.approx(
    [0.75**3] * 3
  )
  # Two times a wrong digit can be right again: m is 7, a is 4, wrong is 9, and both doubled end in
  # 8.
  times = "*2a*2b*2c+1d?cm7n3;"
  assert task.prefix_values(times, [["a9;", "c8;", "#8$"], ["a4;", "c8;", "#8$"]])[
    0
  ] == pytest.approx([0.75**3, 0.75**2, 0.75])


def test_a_wrong_value_that_stands_is_worth_nothing_unless_the_rest_forgives_it():
  task = Chains(ChainsConfig(lines=4))
  right = ["a0;", "c6;", "#6$"]

  def values(prompt, *steps, others=(right,)):
    return task.prefix_values(prompt, [[*steps, "#6$"], *others])[0]

  prompt = "+3a*2b-4c+1d?cm7n3;"  # a is 0, c is 6
  # It stands until it is overwritten, or until something right stands below it.
  assert values(prompt, "a1;", "b6;", "c7;")[1:] == [0, 0, 0]
  assert values(prompt, "a1;", "a0;")[1:] == pytest.approx([0, 0.75**2])
  assert values(prompt, "a1;", "c6;")[1:] == pytest.approx([0, 0.75])
  assert values(prompt, "c6;", "a1;")[1:] == pytest.approx([0.75, 0.75])  # Nobody reads a any more.
  assert values(prompt, "m8;", "m7;")[1:] == pytest.approx([0, 0.75**3])  # A starting value too.
  # What is no write changes nothing, whatever the labels say of it.
  assert values(prompt, "?a;", "z1;", "a11;", "#6;")[1:] == pytest.approx([0.75**3] * 4)
  # Times 0 all is forgiven: c is 0 whatever a is, so long as c itself is right.
  zero = "+3a*2b*0c+1d?cm7n3;"
  solved = ["a0;", "c0;", "#0$"]
  assert task.prefix_values(zero, [["a1;", "c4;", "c0;", "#0$"], solved])[0] == pytest.approx(
    [0.75**3, 0.75**2, 0, 0.75]
  )


@pytest.mark.parametrize("others", [1, 8, 1000])
def test_prefix_values_tend_to_the_others_success(others):
  """One who makes no mistakes is as sure as can be,
  and one who makes them all knows it from the start."""
  task = Chains(ChainsConfig(lines=4))
  prompt, right, wrong = "+3a*2b-4c+1d?cm7n3;", ["a0;", "c6;", "#6$"], ["a1;", "c7;", "#7$"]
  sure, unsure = (others + 0.5) / (others + 1), 0.5 / (others + 1)
  assert task.prefix_values(prompt, [right] * (others + 1))[0] == pytest.approx(
    [sure**3, sure**2, sure]
  )
  # Of those who never wrote the first line rightly nobody showed how the others go: one half each.
  assert task.prefix_values(prompt, [right] + [wrong] * others)[0] == pytest.approx(
    [unsure / 4, 0.25, 0.5]
  )
  # How far one came oneself is not counted.
  assert (
    task.prefix_values(prompt, [right, *[right] * others])[0]
    == (task.prefix_values(prompt, [[*right[:2], "#1$"], *[right] * others])[0])
  )
  assert task.prefix_values(prompt, [right])[0] == [0.125, 0.25, 0.5]


def test_prefix_values_do_not_read_the_rest_of_their_own_answer():
  task, dice = Chains(ChainsConfig(lines=6)), random.Random(1)
  prompt, _ = task.demonstration(0, True)
  others = [_perturbed(task, 0, dice)[1] for _ in range(5)]
  for _ in range(20):
    ours, theirs = (_perturbed(task, 0, dice)[1] for _ in range(2))
    j = dice.randrange(min(len(ours), len(theirs)))
    grafted = [*ours[:j], *theirs[j:]]
    values = [task.prefix_values(prompt, [steps, *others])[0] for steps in (ours, grafted)]
    assert values[0][: j + 1] == values[1][: j + 1]


def test_a_prompt_of_another_task_is_refused():
  with pytest.raises(ValueError, match="not a prompt of the task chains"):
    Chains(ChainsConfig()).label_steps("1+1=", ["2"], truncated=False)


_SMALL = Chains(ChainsConfig(lines=4))
_ALPHABET = "0123456789+-*?;#abcdef$"


@settings(max_examples=150, deadline=None)
@given(
  text=st.one_of(
    st.text(_ALPHABET, max_size=30),
    # Mostly well-formed, so that the rules and not only the parser are tried.
    st.lists(
      st.one_of(
        st.from_regex(r"[a-f][0-9];|#[0-9]\$", fullmatch=True), st.text(_ALPHABET, max_size=4)
      )
    ).map("".join),
  ),
  index=st.integers(0, 5),
  truncated=st.booleans(),
)
def test_every_step_of_any_text_has_one_role(text, index, truncated):
  task = _SMALL
  problem = task.problem("train", index)
  steps = _cut(text)
  assert "".join(steps) == text
  roles = task.label_steps(problem.prompt, steps, truncated)
  assert len(roles) == len(steps)
  assert set(roles) <= set(ROLES)
  if task.verify(problem, text, truncated).correct:
    assert roles[-1] in ("necessary", "repair")


# An independent reading of the rules: positions instead of labels, provenance forwards instead of a
# walk backwards, and expected values by recomputing the whole chain.


_Reading = collections.namedtuple("_Reading", "lines labels start other others modulus")


def _read(prompt: str, modulus: int) -> _Reading:
  """A prompt's queried chain: `labels[0]` is its starting value, `labels[p]` its p-th line;
  and the other's labels."""
  body, rest = prompt.split("?")
  lines = [body[i : i + 3] for i in range(0, len(body), 3)]
  parity = next(i for i, line in enumerate(lines) if line[2] == rest[0]) % 2
  mine, others = lines[parity::2], lines[1 - parity :: 2]
  return _Reading(
    lines=mine,
    labels=[rest[1 + 2 * parity], *(line[2] for line in mine)],
    start=int(rest[2 + 2 * parity]),
    other=others[0][2],
    others={rest[3 - 2 * parity], *(line[2] for line in others)},
    modulus=modulus,
  )


def _fill(reading: _Reading, board: dict[int, int]) -> list[int]:
  """The value at every position when those on the board stand and the others follow."""
  values = [board.get(0, reading.start)]
  for p, (symbol, y, _) in enumerate(reading.lines, 1):
    values.append(board.get(p, _apply(symbol, values[-1], int(y), reading.modulus)))
  return values


def _independent_labels(prompt, modulus, steps, truncated):
  reading = _read(prompt, modulus)
  true, end = _fill(reading, {}), len(reading.labels) - 1
  board: dict[int, int] = {}
  provenance: dict[int, frozenset[int]] = {}

  def led_to(below):
    """What the steps that led to the nearest standing value below a position were."""
    return next((provenance[p] for p in range(below - 1, -1, -1) if p in board), frozenset())

  roles, live = [], None
  for k, step in enumerate(steps):
    last = k == len(steps) - 1
    if re.fullmatch(r"[a-z]\d;", step):
      if step[0] in reading.others:
        roles.append("irrelevant")
        continue
      if step[0] not in reading.labels:
        roles.append("error")
        continue
      p, value = reading.labels.index(step[0]), int(step[1])
      standing = board.get(p, reading.start if p == 0 else None)
      if value == standing:
        roles.append("redundant")
        continue
      expected = _fill(reading, {q: v for q, v in board.items() if q < p})[p]
      roles.append(_role(value, expected, true[p], standing))
      provenance[p] = led_to(p) | {k}
      board[p] = value
    elif last and truncated:
      roles.append("irrelevant")
    elif last and re.fullmatch(r".*#\d\$", step):
      roles.append(_role(int(step[-2]), _fill(reading, board)[end], true[end], board.get(end)))
      live = led_to(end + 1) | {k}
    else:
      roles.append("error")
  live = led_to(end + 1) if live is None else live
  return [
    "redundant" if r in ("necessary", "repair") and k not in live else r
    for k, r in enumerate(roles)
  ]


def _role(value, expected, true, standing):
  if value != true:
    return "inherits" if value == expected else "error"
  return "repair" if value != expected or standing not in (None, true) else "necessary"


def _apply(symbol: str, x: int, y: int, modulus: int) -> int:
  return {"+": x + y, "-": x - y, "*": x * y}[symbol] % modulus


def _answered(name):
  return [case for case in _labelled(name) if not case[2] and re.search(r"#\d\$\Z", case[1][-1])]


@functools.cache
def _task(name, prompt):
  return Chains(ChainsConfig(lines=prompt.index("?") // 3, modulus=TASKS[name][0]))


def _problem(task, prompt):
  return Problem(0, prompt, str(_fill(_read(prompt, task.config.modulus), {})[-1]))


def _cut(text: str) -> list[str]:
  return [text[a:b] for a, b in cut([c.encode() for c in text], Chains.step_end)]

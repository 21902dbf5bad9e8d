"""How a language model is spoken to over several turns, and problems of reasoning-gym."""

import json

import pytest
import words

from dca_jax.errors import UserError
from dca_jax.rollout.turns import observed
from dca_jax.tasks.chat import CHARACTERS_END, Chat, ChatConfig
from dca_jax.tasks.gym import GymConfig

TOOLS = (
  "{% for m in messages %}<|start|>{{ m['role'] }}\n{% if m['role'] == 'tool' %}"
  "<result>{{ m['content'] }}</result>{% else %}{{ m['content'] }}{% endif %}<|end|>\n{% endfor %}"
  "{{ '<|start|>assistant\n' }}"
)
FORGETS = (
  "{% for m in messages %}{% if m['role'] != 'assistant' or loop.last or loop.revindex == 2 %}"
  "<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% else %}(left out){% endif %}"
  "{% endfor %}{{ '<|start|>assistant\n' }}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return words.save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def chat(folder, template=None, **changes) -> Chat:
  options = json.dumps({"chat_template": template} if template else {})
  return Chat(ChatConfig(tokenizer=folder, template_kwargs=options, **changes))


@pytest.mark.parametrize("role", ["user", "tool"])
@pytest.mark.parametrize("template", [None, TOOLS])
def test_a_conversation_goes_on_as_the_template_writes_it(folder, role, template):
  """Piece by piece it becomes what the template makes of the whole."""
  own = chat(folder, template, system_prompt="Be brief.")
  said = [("user", "What is 3 + 4?"), ("assistant", "3 + 4 = 7."), (role, "Tom buys 7.")]
  frame = own.between(role)
  end = own.tokenizer("<|end|>")["input_ids"][-1]
  written = own.tokenizer("3 + 4 = 7.", add_special_tokens=False)["input_ids"]
  asked = own.tokenizer(own.ask("What is 3 + 4?"), add_special_tokens=False)["input_ids"]
  given = observed(own.tokenizer, frame, "Tom buys 7.", [end])
  assert own.tokenizer.decode([*asked, *written, end, *given]) == own.render(said)


def test_a_question_that_an_environment_asks_stands_where_questions_stand(folder):
  own = chat(folder, prompt="Look: {question} Then act.")
  before, frame = own.opening
  assert before + frame[0] + "Tom has 4 apples." + frame[1] == own.ask("Tom has 4 apples.")


def test_a_template_that_rewrites_what_was_said_is_refused(folder):
  with pytest.raises(UserError, match=r"task.chat_template.*does not go on a conversation"):
    chat(folder, FORGETS).between("user")


def test_problems_of_reasoning_gym_are_scored_by_their_own_verifier():
  pytest.importorskip("reasoning_gym")
  task = GymConfig(dataset="chain_sum", settings='{"max_terms": 2}').open()
  problem = task.problem("train", 7)
  assert problem == task.problem("train", 7)
  assert problem.prompt != task.problem("train", 8).prompt != task.problem("heldout", 8).prompt
  tokenizer = task.tokenizer()
  assert tokenizer.decode(tokenizer(problem.rendered)["input_ids"]) == problem.prompt
  for said, right in (
    (problem.answer + CHARACTERS_END, True),
    (f"So\n{problem.answer}", True),
    (f"<answer>{problem.answer}</answer> or so", True),
    ("", False),
    (f"{problem.answer}1", False),
  ):
    assert task.verify(problem, said, False).correct == right, said
  assert not task.verify(problem, problem.answer, True).correct
  assert task.demonstration(3, False)[1].endswith(CHARACTERS_END)
  with pytest.raises(UserError, match=r"task.dataset.*'chain_summ'"):
    GymConfig(dataset="chain_summ").open()

"""Flags that say where problems are and how their rows are read and checked."""

from __future__ import annotations

from absl import flags

from jaxrl.data.tasks import TASKS, Task, get_task
from jaxrl.rewards.checking import AnswerRule

FLAGS = flags.FLAGS

flags.DEFINE_string('train', None, 'Training problems: JSONL (also gzip) or Parquet.')
flags.DEFINE_string('test', None, 'Held-out problems, likewise.')
flags.DEFINE_enum('task', 'gsm8k', sorted(TASKS),
                  'How rows become prompts and answers are checked.')
flags.DEFINE_string('prompt_field', None, 'Field of the question; default: the task\'s.')
flags.DEFINE_string('answer_field', None, 'Field of the gold answer; default: the task\'s.')
flags.DEFINE_string('id_field', None, 'Field of the row id; default: id, or file and row number.')
flags.DEFINE_string('template', None, 'Prompt with {question} in it; default: the task\'s.')
flags.DEFINE_integer('train_limit', None, 'Use only the first training rows.', lower_bound=1)
flags.DEFINE_integer('test_limit', None, 'Use only the first held-out rows.', lower_bound=1)
flags.DEFINE_enum('over_length', 'error', ['error', 'drop', 'truncate'],
                  'What to do with rows that are too long; truncate cuts responses that are given, '
                  'which only sft has.')
flags.DEFINE_float('check_timeout', 5.0, 'Seconds for one symbolic comparison (math only).',
                   lower_bound=0.0)


def task() -> Task:
  """The task with the fields and template that flags override."""
  return get_task(
      FLAGS.task, prompt_field=FLAGS.prompt_field, answer_field=FLAGS.answer_field,
      id_field=FLAGS.id_field, template=FLAGS.template)


def answer_rule() -> AnswerRule:
  """How answers of the task are extracted and compared."""
  chosen = TASKS[FLAGS.task]
  if chosen.answer_kind == 'math':
    return AnswerRule('math', chosen.marker, symbolic=True, timeout=FLAGS.check_timeout)
  return AnswerRule(chosen.answer_kind, chosen.marker)

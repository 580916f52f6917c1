"""The log: means of windows, rows that are named, steps that are skipped, numbers of the clock."""

import math

import numpy as np
import pytest

from jaxrl.errors import InputError
from jaxrl.losses.mean import Mean
from jaxrl.training import step_log
from jaxrl.training.step_log import NonFiniteError, StepLog, Watch, mean_metrics, peak_bytes


def mean(total, count=1.0):
  return Mean(np.float32(total), np.float32(count))


def metrics(loss=1.0, in_a_row=0, row_finite=None):
  bad = not math.isfinite(loss)
  m = {'loss': mean(loss), 'grad_norm': mean(loss), 'nonfinite': mean(bad),
       'skipped_in_a_row': mean(in_a_row), 'num_tokens': mean(20), 'padding': mean(8, 32)}
  return m if row_finite is None else m | {'row_finite': np.array(row_finite)}


class Log:
  """A `StepLog` of ten steps, logging every second, with what it wrote."""

  def __init__(self, **watch):
    self.written, self.warnings = {}, []
    self.log = StepLog(self.written.__setitem__, lambda step: 0.5, steps=10, log_every=2,
                       watch=Watch(**watch), warn=self.warnings.append)

  def add(self, *steps):
    for step, m in steps:
      rows = len(m.get('row_finite', range(4)))
      self.log.add(step, m, {'numbers': np.array([*range(10, 10 + rows)])})
    return self


def test_a_window_is_the_mean_of_its_steps():
  log = Log().add((1, metrics(1.0)), (2, metrics(4.0)), (3, metrics(7.0)))
  assert list(log.written) == [2]
  numbers = log.written[2]
  assert numbers['loss'] == 2.5 and numbers['num_tokens'] == 40 and numbers['padding'] == 0.25
  assert numbers['learning_rate'] == 0.5
  assert not {'nonfinite', 'skipped_in_a_row', 'skipped_steps', 'perf/mfu_full'} & numbers.keys()
  assert len(log.log.seen) == 1


def test_ratios_add_up_before_they_are_divided():
  """A count that is an estimate may come out negative: then the ratio cannot be told."""
  assert mean_metrics([{'a': mean(6, 2)}, {'a': mean(3, 1), 'b': mean(1, -4)}]) == {
      'a': 3, 'b': math.inf}
  assert mean_metrics([{'a': mean(6, -2)}, {'a': mean(3, 5)}]) == {'a': 3}
  assert mean_metrics([{'a': mean(0, 0)}]) == {'a': 0}


@pytest.mark.parametrize(('row_finite', 'watch', 'message'), [
    (None, {}, 'Batch 2 held 4 rows. Lower'),
    ([True, False, True, False], {}, 'from 0: 11, 13. Lower'),
    ([True] * 4, {}, 'each with a finite loss: it was the gradient'),
    ([False] * 30, {}, 'from 0: 10, 11, 12, 13, 14, 15, 16, 17 and 22 more'),
])
def test_rows_are_named_where_a_step_stops_the_run(row_finite, watch, message):
  with pytest.raises(NonFiniteError, match='step 3: the loss is nan.*not applied.*' + message):
    Log(**watch).add((3, metrics(math.nan, 1, row_finite)))


def test_skipped_steps_are_counted_and_leave_the_means_alone():
  log = Log(on_nonfinite='skip').add(
      (1, metrics(3.0)), (2, metrics(math.nan, 1, [True, True, True, False])),
      (3, metrics(math.nan, 2)), (4, metrics(math.inf, 3)), (5, metrics(5.0)), (6, metrics(7.0)))
  assert [log.written[step].get('loss') for step in (2, 4, 6)] == [3.0, None, 6.0]
  assert [log.written[step]['skipped_steps'] for step in (2, 4, 6)] == [1, 2, 0]
  assert [warning.split(':')[0] for warning in log.warnings] == ['step 2', 'step 3', 'step 4']
  assert 'counted from 0: 13.' in log.warnings[0]
  assert log.written[4]['num_tokens'] == 40


def test_too_many_skips_in_a_row_stop():
  log = Log(on_nonfinite='skip', max_skips=2).add(
      (1, metrics(math.nan, 1)), (2, metrics(math.nan, 2)))
  with pytest.raises(NonFiniteError, match='step 3: .* 3 steps in a row .*--max_skips is 2'):
    log.add((3, metrics(math.nan, 3)))


@pytest.mark.parametrize(('watch', 'message'), [
    ({'on_nonfinite': 'ignore'}, '--on_nonfinite: .*stop, skip; found ignore'),
    ({'on_nonfinite': 'skip', 'max_skips': 0}, '--max_skips: .*at least 1; found 0')])
def test_policies_that_cannot_be(watch, message):
  with pytest.raises(InputError, match=message):
    Watch(**watch)


def test_the_clock_is_split_and_work_compared_with_the_peak(monkeypatch):
  """Two steps: 1 s for a batch and 2 s to hand it over; ready at 7 s and 10 s."""
  now = [0.0]
  monkeypatch.setattr(step_log.time, 'perf_counter', lambda: now[0])

  def wait(what, seconds):
    with log.log.timed(what):
      now[0] += seconds

  log = Log(flops_of=lambda batch: (1.5e12, 4e12), peak_tflops=2.0, devices=2,
            programs=lambda: 7)
  log.log.since = 0.0
  wait('batch', 1), wait('dispatch', 2)      # 3: the first can start
  wait('batch', 1), wait('dispatch', 2)      # 6
  now[0] = 7.0
  log.add((1, metrics()))                    # 3 to 7
  now[0] = 10.0
  log.add((2, metrics()))                    # 7 to 10
  numbers = log.written[2]
  assert {name: numbers[f'perf/{name}_seconds'] for name in ('batch', 'dispatch', 'device')} == {
      'batch': 1, 'dispatch': 2, 'device': 3.5}
  assert numbers['perf/seconds_per_step'] == 5 and numbers['perf/tokens_per_second'] == 4
  assert numbers['perf/input_tokens_per_second'] == 4.8
  assert numbers['perf/mfu_causal'] == pytest.approx(3e12 / (10 * 2 * 2e12))
  assert numbers['perf/mfu_full'] == pytest.approx(8e12 / (10 * 2 * 2e12))
  assert numbers['perf/compiled_programs'] == 7


def test_memory_is_that_of_the_fullest_device_or_of_the_process(monkeypatch):
  assert 1e7 < peak_bytes() < 1e12

  class Device:
    def __init__(self, stats):
      self.memory_stats = lambda: stats

  monkeypatch.setattr(step_log.jax, 'local_devices', lambda: [
      Device({'peak_bytes_in_use': 5}), Device({'peak_bytes_in_use': 9}), Device(None)])
  assert peak_bytes() == 9

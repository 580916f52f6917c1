"""What the environment says about the processes of a run, and a run of one; see tests/processes."""

import pytest

from jaxrl.errors import InputError
from jaxrl.parallel import hosts
from jaxrl.parallel.hosts import HostsConfig, config_from_environment

GIVEN = {'JAXRL_COORDINATOR': 'host:123', 'JAXRL_PROCESSES': '4', 'JAXRL_PROCESS_ID': '3'}


def test_the_environment_is_read():
  assert config_from_environment({}) is None
  assert config_from_environment(GIVEN) == HostsConfig('host:123', 4, 3)
  assert config_from_environment(GIVEN | {'JAXRL_LOST_AFTER': '2.5'}).lost_after == 2.5
  assert config_from_environment(GIVEN | {'JAXRL_COORDINATOR': '[::1]:9'}).coordinator == '[::1]:9'
  assert config_from_environment({'JAXRL_COORDINATOR': 'auto'}) == HostsConfig('auto')
  assert HostsConfig('auto').lost_after < 60


@pytest.mark.parametrize(('changes', 'where'), [
    ({'JAXRL_COORDINATOR': ''}, 'JAXRL_COORDINATOR'),
    ({'JAXRL_COORDINATOR': 'host'}, 'JAXRL_COORDINATOR'),
    ({'JAXRL_COORDINATOR': ':123'}, 'JAXRL_COORDINATOR'),
    ({'JAXRL_COORDINATOR': 'host:0'}, 'JAXRL_COORDINATOR'),
    ({'JAXRL_COORDINATOR': 'host:65536'}, 'JAXRL_COORDINATOR'),
    ({'JAXRL_COORDINATOR': 'auto'}, 'JAXRL_PROCESSES'),
    ({'JAXRL_PROCESSES': ''}, 'JAXRL_PROCESSES'),
    ({'JAXRL_PROCESSES': '0'}, 'JAXRL_PROCESSES'),
    ({'JAXRL_PROCESSES': 'two'}, 'JAXRL_PROCESSES'),
    ({'JAXRL_PROCESS_ID': ''}, 'JAXRL_PROCESS_ID'),
    ({'JAXRL_PROCESS_ID': '-1'}, 'JAXRL_PROCESS_ID'),
    ({'JAXRL_PROCESS_ID': '4'}, 'JAXRL_PROCESS_ID'),
    ({'JAXRL_LOST_AFTER': '0'}, 'JAXRL_LOST_AFTER'),
    ({'JAXRL_LOST_AFTER': 'nan'}, 'JAXRL_LOST_AFTER'),
    ({'JAXRL_LOST_AFTER': 'inf'}, 'JAXRL_LOST_AFTER')])
def test_what_cannot_be_used_is_named(changes, where):
  with pytest.raises(InputError, match=f'^{where}: '):
    config_from_environment(GIVEN | changes)


def test_a_run_of_one_process_needs_nobody():
  with pytest.raises(KeyError), hosts.start(None):
    assert hosts.is_writer()
    hosts.barrier('here', 0.0)
    assert hosts.broadcast({'a': [1, None, 'x']}) == {'a': [1, None, 'x']}
    assert hosts.broadcast((1, 2)) == [1, 2], 'as the other processes of a larger run would get it'
    raise KeyError

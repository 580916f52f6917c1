"""`bucket_irpo.py [FLAGS...]`: experiments.irpo, whose logs of samples reach a bucket at once."""

import runpy

from jaxrl.runs import working_copy

if __name__ == '__main__':
  working_copy.LOG_SECONDS = 0.0
  runpy.run_module('experiments.irpo', run_name='__main__', alter_sys=True)

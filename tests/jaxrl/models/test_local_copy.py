"""Model folders on gs:// are read as those of this machine are, and brought once."""

import tempfile

import jax
import numpy as np
import pytest

from jaxrl import objects
from jaxrl.errors import InputError
from jaxrl.models.hugging_face import load_params, read_config, save_model
from jaxrl.models.local_copy import local_copy
from tests.tiny_model import CONFIG, random_params

WEIGHTS = 'models/tiny/model.safetensors'


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  folder = tmp_path_factory.mktemp('saved') / 'model'
  save_model(folder, random_params(), CONFIG, tokenizer_from=None)
  return folder


@pytest.fixture
def url(bucket, saved, tmp_path, monkeypatch):
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
  objects.upload(saved, f'{bucket.url}/models/tiny')
  bucket.asked.clear()
  return f'{bucket.url}/models/tiny'


def test_the_same_parameters_as_from_a_disk(bucket, saved, url):
  config = read_config(url)
  assert config == read_config(saved)
  assert ('GET', WEIGHTS) not in bucket.asked       # which a configuration does not need
  found, expected = load_params(url, config), load_params(saved, config)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(a, b)


def test_it_is_brought_once_and_again_when_it_has_changed(bucket, url):
  first = load_params(url, read_config(url))
  bucket.asked.clear()
  load_params(url, read_config(url))
  assert bucket.asked == []
  content = bytearray(bucket.content(WEIGHTS))
  content[-1] ^= 1
  objects.write(f'{url}/model.safetensors', bytes(content))
  second = load_params(url, read_config(url))
  assert any((a != b).any() for a, b in zip(
      jax.tree.leaves(first), jax.tree.leaves(second), strict=True))


def test_what_is_never_loaded_is_not_brought(bucket, url):
  bucket.objects['models/tiny/pytorch_model.bin'] = b'x' * 1000, 1
  bucket.objects['models/tiny/original/consolidated.00.pth'] = b'x' * 1000, 2
  assert (local_copy(url) / 'pytorch_model.bin').stat().st_size == 0
  assert not (local_copy(url) / 'original').exists()
  del bucket.objects[WEIGHTS]
  with pytest.raises(InputError, match='the weights are pickle files'):
    load_params(url, read_config(url))


def test_nothing_there(bucket):
  with pytest.raises(InputError, match=f'{bucket.url}/no: this is not a model folder.*nothing'):
    read_config(f'{bucket.url}/no')

"""Hugging Face folders in and out.

A family of models is one row in `hugging_face_names.TENSORS` and one in
`hugging_face_families.FAMILIES`; nothing that reads or writes knows families apart.
"""

from jaxrl.models.hugging_face_config import read_config, write_config
from jaxrl.models.load import load_params
from jaxrl.models.save import save_model

__all__ = ['load_params', 'read_config', 'save_model', 'write_config']

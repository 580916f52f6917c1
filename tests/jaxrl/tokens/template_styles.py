"""Chat templates in the style of published checkpoints, each with a small tokenizer of its kind."""

import dataclasses

from tokenizers import AddedToken

from tests.jaxrl.tokens import small_tokenizers

ALTERNATE = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}")

LLAMA_2 = (
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = messages[0].content %}{% else %}{% set rest = messages %}"
    "{% set system = false %}{% endif %}{% for m in rest %}" + ALTERNATE +
    "{% if loop.index0 == 0 and system != false %}"
    "{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m.content %}"
    "{% else %}{% set content = m.content %}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}")

LLAMA_3 = (
    "{{- bos_token }}{%- if messages[0].role == 'system' %}"
    "{%- set system = messages[0].content | trim %}{%- set messages = messages[1:] %}"
    "{%- else %}{%- set system = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}"
    "{{- 'Cutting Knowledge Date: December 2023\\nToday Date: 26 Jul 2024\\n\\n' }}"
    "{{- system + '<|eot_id|>' }}{%- for m in messages %}"
    "{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim }}"
    "{{- '<|eot_id|>' }}{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}")

MISTRAL = (
    "{{ bos_token }}{% for m in messages %}" + ALTERNATE +
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}")

QWEN_2_5 = (
    "{%- if messages[0].role == 'system' %}"
    "{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- else %}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}"
    "{%- for m in messages %}{%- if m.role != 'system' %}"
    "{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}")

# Thinking stays in the last turn only, and is written anew there, in one layout.
QWEN_3 = (
    "{%- if messages[0].role == 'system' %}"
    "{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}"
    "{%- set ns = namespace(last=0) %}{%- for m in messages %}"
    "{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}"
    "{{- '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}{%- elif m.role == 'assistant' %}"
    "{%- set content = m.content %}{%- set thought = '' %}{%- if '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\\n' }}{%- if loop.index0 > ns.last %}"
    "{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{%- endif %}"
    "{{- content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}")

GEMMA_2 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}" +
    ALTERNATE + "{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}")

GEMMA_3 = (
    "{{ bos_token }}{%- if messages[0].role == 'system' -%}"
    "{%- set prefix = messages[0].content + '\\n\\n' -%}{%- set rest = messages[1:] -%}"
    "{%- else -%}{%- set prefix = '' -%}{%- set rest = messages -%}{%- endif -%}"
    "{%- for m in rest -%}" + ALTERNATE +
    "{%- set role = 'model' if m.role == 'assistant' else m.role -%}"
    "{{ '<start_of_turn>' + role + '\\n' + (prefix if loop.first else '') }}"
    "{{ m.content | trim }}{{ '<end_of_turn>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}")

# Its role marks swallow the newline after them (rstrip), so a response follows a mark.
PHI_3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}")

PHI_4 = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}")

# Role marks are ordinary text, BOS and EOS one token.
OLMO_2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|assistant|>\\n' + m.content + eos_token + ('' if loop.last else '\\n') }}{% else %}"
    "{{ '<|' + m.role + '|>\\n' + m.content + '\\n' }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}")

# BOS is the mark that begins every turn.
SMOLLM_2 = (
    "{% for m in messages %}{% if loop.first and messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful AI assistant<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")

# Opens the thinking itself when it asks, and drops it from what was said.
DEEPSEEK_R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% else %}"
    "{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}")


@dataclasses.dataclass(frozen=True)
class Style:
  """A template with its tokenizer.

  `keeps` says that a conversation is the prompt, the response and the end; `after` is what it has
  between the response and the end. `system` says what becomes of a system message.
  """

  template: str
  family: str
  bos: str | None
  eos: str
  ends: str                            # what ends a turn
  special: tuple[str, ...] = ()
  added: tuple[str, ...] = ()          # tokens that are not special
  system: bool = True
  keeps: bool = True
  after: str = ''
  rstrip: bool = False


STYLES = {
    'llama_2': Style(LLAMA_2, 'metaspace_bpe', '<s>', '</s>', '</s>', after=' '),
    'llama_3': Style(
        LLAMA_3, 'split_bytes', '<|begin_of_text|>', '<|end_of_text|>', '<|eot_id|>',
        ('<|start_header_id|>', '<|end_header_id|>')),
    'mistral': Style(MISTRAL, 'metaspace_bpe', '<s>', '</s>', '</s>', system=False),
    'qwen_2_5': Style(
        QWEN_2_5, 'split_bytes', None, '<|im_end|>', '<|im_end|>', ('<|endoftext|>',)),
    'qwen_3': Style(
        QWEN_3, 'split_bytes', None, '<|im_end|>', '<|im_end|>', ('<|endoftext|>',),
        ('<think>', '</think>'), keeps=False),
    'gemma_2': Style(
        GEMMA_2, 'replaced_bpe', '<bos>', '<eos>', '<end_of_turn>', ('<start_of_turn>',),
        ('\n', '\n\n'), system=False),
    'gemma_3': Style(
        GEMMA_3, 'replaced_bpe', '<bos>', '<eos>', '<end_of_turn>', ('<start_of_turn>',),
        ('\n', '\n\n')),
    'phi_3': Style(
        PHI_3, 'metaspace_bpe', '<s>', '<|endoftext|>', '<|end|>',
        ('<|system|>', '<|user|>', '<|assistant|>'), rstrip=True),
    'phi_4': Style(
        PHI_4, 'split_bytes', '<|endoftext|>', '<|endoftext|>', '<|im_end|>', ('<|im_sep|>',)),
    'olmo_2': Style(OLMO_2, 'byte_level', '<|endoftext|>', '<|endoftext|>', '<|endoftext|>'),
    'smollm_2': Style(SMOLLM_2, 'byte_level', '<|im_start|>', '<|im_end|>', '<|im_end|>'),
    'chatml': Style(small_tokenizers.CHATML, 'byte_level', '<s>', '<|im_end|>', '<|im_end|>'),
    'deepseek_r1': Style(
        DEEPSEEK_R1, 'split_bytes', '<｜begin▁of▁sentence｜>', '<｜end▁of▁sentence｜>',
        '<｜end▁of▁sentence｜>', ('<｜User｜>', '<｜Assistant｜>'), ('<think>', '</think>'),
        keeps=False),
    'unigram_chatml': Style(
        small_tokenizers.CHATML, 'unigram_bytes', '<s>', '<|im_end|>', '<|im_end|>'),
}


def write(folder, style: Style):
  """The folder of a tokenizer in this style; generation_config.json names every end."""
  marks = [token for token in (style.bos, style.eos, style.ends, *style.special) if token]
  tokens = [AddedToken(token, special=True, normalized=False, rstrip=style.rstrip)
            for token in dict.fromkeys(marks) if token not in small_tokenizers.SPECIAL]
  tokens += [AddedToken(token, special=False, normalized=False) for token in style.added]
  small_tokenizers.write(folder, style.family, style.template, adds_bos=False, added=tokens,
                         bos_token=style.bos, eos_token=style.eos)
  import transformers

  vocabulary = transformers.AutoTokenizer.from_pretrained(folder).get_vocab()
  ends = [vocabulary[token] for token in dict.fromkeys((style.eos, style.ends))]
  (folder / 'generation_config.json').write_text(f'{{"eos_token_id": {ends}}}')
  return folder

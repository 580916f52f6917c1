"""A plan as tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import rich.box
from rich.console import Console
from rich.table import Table

UNITS = ((1e15, 'P'), (1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k'))
COLUMNS = ('parameters', 'optimizer', 'start', 'masters', 'cache', 'working', 'total')


def show(plan: Mapping, console: Console) -> None:
  """Prints what `launch.plan` found, its JSON."""
  setting = plan['setting']
  console.print(f"{plan['topology']['name']}: {plan['topology']['chips']} chips of "
                f"{gib(plan['topology']['memory'])} GiB; {setting['model']}, "
                f"{scaled(setting['parameters'])} parameters; "
                f"prompts of {setting['prompt_tokens']} "
                f"ids, responses of {setting['response_tokens']}", highlight=False)
  if plan['candidates']:
    _candidates(plan['candidates'], console)
  if plan['programs']:
    _memory(plan['programs'], plan['topology']['memory'], console)
    _speed(plan['programs'], console)
    _collectives(plan['programs'], console)
  console.print(plan['verdict'], highlight=False, soft_wrap=True)
  for line in plan['advice']:
    console.print(f'  - {line}', highlight=False, soft_wrap=True)


def _table(console: Console, title: str, rows: Sequence[Sequence[str]], *columns: str) -> None:
  table = Table(box=rich.box.SIMPLE, title=title, title_justify='left')
  for n, column in enumerate(columns):
    table.add_column(column, justify='left' if n == 0 else 'right')
  for row in rows:
    table.add_row(*row)
  console.print(table)


def _candidates(candidates: Sequence[Mapping], console: Console) -> None:
  rows = [(' '.join(c['flags']), gib(c['estimated_bytes']), f"{c['estimated_seconds']:.3g}",
           gib(c['bytes']) if c.get('bytes') else '', _seconds(c.get('seconds')),
           c['said']) for c in candidates]
  _table(console, 'layouts of training (GiB per device, seconds of a step)', rows, 'flags',
         'estimate', 's', 'compiled', 's', '')


def _memory(programs: Sequence[Mapping], memory: int, console: Console) -> None:
  rows = []
  for p in programs:
    held = p['bytes_per_device']
    used = [gib(held[name]) if name in held else '' for name in COLUMNS]
    rows.append((p['program'], *used, 'yes' if p['fits'] else 'NO'))
  _table(console, f'GiB per device, of {gib(memory)}', rows, 'program', *COLUMNS, 'fits')


def _speed(programs: Sequence[Mapping], console: Console) -> None:
  rows = []
  for p in programs:
    s = p['seconds']
    per_chip, mfu = p['tokens_per_second_per_chip'], p['mfu']
    rows.append((
        p['program'], p['call'], scaled(p['flops']['useful']), scaled(p['flops']['computed']),
        *(_seconds(s[name]) for name in ('compute', 'memory', 'links', 'roofline')),
        f'{per_chip:,.0f}' if per_chip else '', f'{mfu:.0%}' if mfu else '',
        f"{p['compile_seconds']:.0f} s" if p['compiled'] else 'not'))
  _table(console, 'one call at the peak of the chips: an upper bound of speed', rows, 'program',
         'call', 'FLOPs', 'computed', 'compute', 'memory', 'links', 'roofline', 'tokens/s/chip',
         'MFU', 'compiled')


def _collectives(programs: Sequence[Mapping], console: Console) -> None:
  rows = [(p['program'] if n == 0 else '', c['kind'], c['axis'], f"{c['count']:.0f}",
           f"{c['sent'] / 1e9:.3f}", _seconds(c['seconds']))
          for p in programs for n, c in enumerate(p['collectives']) if p['compiled']]
  if rows:
    _table(console, 'collectives of one call (GB that a device sends; seconds on its links)', rows,
           'program', 'kind', 'axis', 'count', 'GB', 's')


def gib(size: float) -> str:
  return f'{size / 2**30:.2f}'


def scaled(count: float) -> str:
  """A count with three digits and a letter."""
  for unit, letter in UNITS:
    if count >= unit:
      return f'{count / unit:.3g}{letter}'
  return f'{count:.3g}'


def _seconds(value: float | None) -> str:
  return '' if value is None else f'{value:.3g}'

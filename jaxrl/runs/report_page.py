"""Turns what `report.gather` found into one HTML page that opens from a file, without a network.

Texts of models and data sets may hold anything. They reach the page only as JSON in data blocks,
in which every character that HTML could act on is written as a \\u escape, and the script inserts
them as text. A content security policy lets exactly the page's own script and style run.
"""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.resources
import json
import re
from typing import Any

# Ends a script block, opens a comment or an entity, ends a line in old scripts, hides or reorders
# text, or cannot be encoded: all of them occur inside JSON strings only, so \uXXXX is exact.
_ESCAPED = re.compile(
    '[<>&\u2028\u2029\x7f-\x9f\u061c\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff\ufffe\uffff'
    '\ud800-\udfff]'
)
_HIDDEN = re.compile(
    '[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]'
)


def render(data: dict[str, Any]) -> str:
  """The page; `data` is what `report.gather` returns."""
  style = _asset('page.css')
  # One function around both files: nothing of the page is a global that text could reach.
  script = f"(() => {{\n'use strict';\n{_asset('charts.js')}\n{_asset('page.js')}\n}})();\n"
  policy = '; '.join((
      "default-src 'none'",
      f"script-src '{_hash(script)}'",
      f"style-src '{_hash(style)}'",
      'img-src data:',
      "base-uri 'none'",
      "form-action 'none'",
  ))
  choices = data['choices']
  drawn = {name: data[name] for name in ('accuracy', 'training', 'lengths', 'outcomes', 'stages')}
  drawn['choices'] = [{k: v for k, v in c.items() if k != 'prompts'} for c in choices]
  blocks = [_data_block('report-data', drawn)]
  blocks += [_data_block(choice['id'], choice['prompts']) for choice in choices]
  heading = _heading(data)
  parts = {
      'policy': html.escape(policy),
      'title': _text(f'{heading} - {data["run"]}'),
      'style': style,
      'run': _text(data['run']),
      'heading': _text(heading),
      'summary': _text(_summary(data)),
      'notes': _notes(data['notes']),
      'cards': ''.join(_cards(data)),
      'settings': _settings(data),
      'data': '\n'.join(blocks),
      'script': script,
  }
  template = _asset('page.html')
  # One pass, so that a value that looks like a placeholder stays as it is.
  return re.sub(r'\{\{(\w+)\}\}', lambda match: parts[match[1]], template)


def _asset(name: str) -> str:
  folder = importlib.resources.files('jaxrl.runs') / 'report_assets'
  return (folder / name).read_text(encoding='utf-8')


def _hash(text: str) -> str:
  return 'sha256-' + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def embed(value: Any) -> str:
  """JSON that is inert inside an HTML data block and parses back to exactly `value`."""
  text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(',', ':'))
  return _ESCAPED.sub(lambda match: f'\\u{ord(match[0]):04x}', text)


def _data_block(name: str, value: Any) -> str:
  return f'<script type="application/json" id="{name}">{embed(value)}</script>'


def _text(value: object) -> str:
  """`value` as HTML text; characters that hide or reorder text are named instead."""
  named = _HIDDEN.sub(lambda match: f'[U+{ord(match[0]):04X}]', str(value))
  return html.escape(named)


def _heading(data: dict[str, Any]) -> str:
  method, model = data['method'], data['model']
  short = re.split(r'[\\/]', model.rstrip('\\/'))[-1] if model else None
  if method and short:
    return f'{method} on {short}'
  return method or short or data['run']


def _summary(data: dict[str, Any]) -> str:
  parts = []
  evaluated = [row['iteration'] for row in data['accuracy'] if row['iteration']]
  planned = data['flags'].get('iterations', '')
  if data['iterations'] is None:
    parts.append('nothing recorded yet')
  else:
    of = f' of {planned}' if planned.isdigit() else ''
    plural = '' if len(evaluated) == 1 and not of or of == ' of 1' else 's'
    parts.append(f'{len(evaluated)}{of} iteration{plural} evaluated')
  if data['totals'].get('samples'):
    parts.append(f'{data["totals"]["samples"]:,} samples')
  if data['totals'].get('pairs'):
    parts.append(f'{data["totals"]["pairs"]:,} pairs')
  seconds = sum(row['seconds'] or 0 for row in data['stages'])
  if seconds:
    parts.append(f'{_duration(seconds)} in finished stages')
  return ' \u00b7 '.join(parts)


def _duration(seconds: float) -> str:
  if seconds < 60:
    return f'{seconds:.1f} s'
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours} h {minutes} min' if hours else f'{minutes} min {rest} s'


def _notes(notes: list[str]) -> str:
  if not notes:
    return ''
  items = ''.join(f'<li>{_text(note)}</li>' for note in notes)
  return f'<aside class="notes" aria-label="Notes on this page"><ul>{items}</ul></aside>'


def _percent(rate: float) -> str:
  return f'{100 * rate:.1f}%'


def _interval(row: dict[str, Any], kind: str) -> str:
  low, high = row.get(f'{kind}_low'), row.get(f'{kind}_high')
  if low is None or high is None:
    return ''
  return f'{100 * low:.1f}\u2013{100 * high:.1f}'


def _card(label: str, value: str, *details: str) -> str:
  """One headline figure; `value` is HTML already, the rest is text."""
  lines = ''.join(f'<p class="detail">{_text(line)}</p>' for line in details if line)
  return f'<div class="card"><h3>{_text(label)}</h3><p class="figure">{value}</p>{lines}</div>'


def _change(before: str, after: str) -> str:
  return (
      f'<span class="before">{_text(before)}</span><span class="arrow" aria-hidden="true"> \u2192 '
      f'</span><span class="visually-hidden"> to </span><b>{_text(after)}</b>'
  )


def _cards(data: dict[str, Any]) -> list[str]:
  """Headline figures: accuracy before and after, their paired difference, the majority vote."""
  cards = []
  for kind, label in (('greedy', 'Greedy accuracy'), ('majority', 'Majority vote')):
    rows = [row for row in data['accuracy'] if row.get(kind) is not None]
    if not rows:
      continue
    first, last = rows[0], rows[-1]
    sample = f'{last["n"]:,} test prompts' if last.get('n') else ''
    if first is last:
      value = f'<b>{_text(_percent(first[kind]))}</b>'
      spans = _interval(first, kind)
    else:
      value = _change(_percent(first[kind]), _percent(last[kind]))
      spans = f'{_interval(first, kind)} \u2192 {_interval(last, kind)}'
    interval = f'95% interval {spans}' if spans.strip(' \u2192') else ''
    iterations = f'iteration {first["iteration"]}'
    iterations += '' if first is last else f' to {last["iteration"]}'
    cards.append(_card(label, value, interval, ', '.join(p for p in (sample, iterations) if p)))
  paired = data['paired']
  if paired:
    value = f'<b>{100 * paired["difference"]:+.1f}</b> <small>points</small>'
    low, high = 100 * paired['low'], 100 * paired['high']
    cards.insert(1, _card(
        'Paired difference',
        value.replace('-', '\u2212'),
        f'95% interval {low:+.1f} to {high:+.1f}'.replace('-', '\u2212'),
        f'{paired["gained"]:,} prompts gained, {paired["lost"]:,} lost, of {paired["n"]:,}',
    ))  # fmt: skip
  return cards


def _settings(data: dict[str, Any]) -> str:
  """Flags, versions and what each stage counted, as closed sections."""
  parts = []
  for title, values in (('Flags', data['flags']), ('Versions', data['versions'])):
    if values:
      rows = ''.join(
          f'<tr><th scope="row">{_text(name)}</th><td>{_text(_plain(value))}</td></tr>'
          for name, value in values.items()
      )
      table = f'<table class="pairs-table">{rows}</table>'
      parts.append(_section(f'{title} ({len(values)})', table))
  rows = ''.join(_stage_row(row) for row in data['stages'])
  if rows:
    head = ''.join(f'<th scope="col">{t}</th>' for t in ('Stage', 'Seconds', 'Rows', 'Counts'))
    table = f'<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    parts.append(_section(f'Finished stages ({len(data["stages"])})', table))
  return ''.join(parts)


def _plain(value: Any) -> str:
  return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _section(title: str, table: str) -> str:
  return (
      f'<details class="section"><summary>{_text(title)}</summary>'
      f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(title)}">{table}</div>'
      '</details>'
  )


def _stage_row(row: dict[str, Any]) -> str:
  name = row['stage'] if row['iteration'] is None else f'{row["iteration"]} {row["stage"]}'
  seconds = '' if row['seconds'] is None else f'{row["seconds"]:,.1f}'
  count = '' if row['rows'] is None else f'{row["rows"]:,}'
  counts = ', '.join(
      f'{name.replace("_", " ")} {format(value, ",") if type(value) is int else _plain(value)}'
      for name, value in row['counts'].items()
  )
  return (
      f'<tr><th scope="row">{_text(name)}</th><td class="number">{seconds}</td>'
      f'<td class="number">{count}</td><td>{_text(counts)}</td></tr>'
  )

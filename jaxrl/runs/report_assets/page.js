// Draws the charts and the browser of samples from the data blocks of the page.

const data = JSON.parse(document.getElementById('report-data').textContent);

// ---- charts

const OUTCOMES = [
  {key: 'all_correct', label: 'all correct', color: 'good'},
  {key: 'mixed', label: 'mixed', color: 'c0'},
  {key: 'all_wrong', label: 'all wrong', color: 'bad'},
  {key: 'no_answer', label: 'no answer', color: 'doubt'},
  {key: 'no_gold', label: 'gold unreadable', color: 'c5'},
];

function drawResults() {
  const results = document.getElementById('results-charts');
  if (data.accuracy.length) {
    intervalChart(results, {
      title: 'Test accuracy by iteration',
      note: 'Bars are 95% intervals.',
      rows: data.accuracy,
      series: [
        {key: 'greedy', label: 'greedy', color: 'c0'},
        {key: 'majority', label: 'majority vote', color: 'c1'},
      ].filter((s) => data.accuracy.some((row) => row[s.key] != null)),
      format: percent,
    });
  }
  if (data.lengths.length) {
    boxChart(results, {
      title: 'Response length in tokens, by iteration',
      note: 'Box: middle half with the median. Whiskers: 5% to 95%.',
      rows: data.lengths,
      groups: [
        {key: 'all', label: 'all samples', color: 'c5'},
        {key: 'chosen', label: 'chosen', color: 'c2'},
        {key: 'rejected', label: 'rejected', color: 'c1'},
      ],
    });
  }
  if (data.outcomes.length) {
    barChart(results, {
      title: 'Training prompts by outcome of their samples',
      rows: data.outcomes.map((row) => ({label: `Iteration ${row.iteration}`, values: row})),
      parts: OUTCOMES,
      format: whole,
      share: true,
    });
  }
  drawStages(results);
}

function drawStages(parent) {
  const timed = data.stages.filter((row) => row.seconds != null);
  if (!timed.length) return;
  const names = [...new Set(timed.map((row) => row.stage))];
  const rows = new Map();
  for (const {iteration, stage, seconds} of timed) {
    const label = iteration == null ? 'Before' : `Iteration ${iteration}`;
    if (!rows.has(label)) rows.set(label, {label, values: {}});
    rows.get(label).values[stage] = seconds;
  }
  barChart(parent, {
    title: 'Time in each stage',
    rows: [...rows.values()],
    parts: names.map((key, i) => ({key, label: key.replaceAll('_', ' '), color: `c${i % 8}`})),
    format: duration,
  });
}

function drawTraining() {
  const {training} = data;
  if (!training.steps.length) return;
  document.getElementById('training').hidden = false;
  const parent = document.getElementById('training-charts');
  const draw = (title, series, options = {}) => {
    const found = series.filter((s) => training.series[s.key]);
    if (found.length) stepChart(parent, training, {title, series: found, ...options});
  };
  const terms = Object.keys(training.series).filter((key) => key.startsWith('loss/'));
  draw('Loss', [{key: 'loss', label: 'loss', color: 'c0'}, ...terms.map((key, i) =>
    ({key, label: key.slice(5).replaceAll('_', ' '), color: `c${i % 7 + 1}`}))]);
  draw('Reward margin, chosen over rejected', [
    {key: 'rewards/margins', label: 'margin', color: 'c0'},
    {key: 'rewards/chosen', label: 'chosen', color: 'c2'},
    {key: 'rewards/rejected', label: 'rejected', color: 'c1'},
  ], {zero: true});
  draw('Pairs ranked right', [{key: 'rewards/accuracies', label: 'accuracy', color: 'c0'}],
    {floor: -0.02, ceiling: 1.02});
  draw('Log-probability of the responses', [
    {key: 'logps/chosen', label: 'chosen', color: 'c2'},
    {key: 'logps/rejected', label: 'rejected', color: 'c1'},
  ]);
  draw('Gradient norm', [{key: 'grad_norm', label: 'norm', color: 'c0'}], {floor: 0});
}

// ---- text of models and data sets

const HIDDEN = new RegExp('[\\u0000-\\u0008\\u000b\\u000c\\u000e-\\u001f\\u007f-\\u009f\\u061c' +
  '\\u200b\\u200e\\u200f\\u2028\\u2029\\u202a-\\u202e\\u2066-\\u2069\\ufeff]|' +
  '[\\ud800-\\udfff]', 'u');

// Puts text into a node as text; names characters that hide or reorder it; marks what is searched.
function show(node, text, query) {
  const found = query ? new RegExp(`(${query.source})`, 'giu') : null;
  (found ? text.split(found) : [text]).forEach((piece, i) => {
    const target = i % 2 ? element('mark') : node;
    let rest = piece, match;
    while ((match = HIDDEN.exec(rest))) {
      const code = match[0].codePointAt(0).toString(16).toUpperCase().padStart(4, '0');
      target.append(rest.slice(0, match.index),
        element('span', {class: 'hidden-char'}, `U+${code}`));
      rest = rest.slice(match.index + match[0].length);
    }
    target.append(rest);
    if (target !== node) node.append(target);
  });
  return node;
}

// ---- the browser of samples

const FILTERS = [
  ['all', 'All'], ['all_correct', 'All correct'], ['mixed', 'Mixed'], ['all_wrong', 'All wrong'],
  ['truncated', 'Truncated'], ['pairs', 'Has pairs'], ['unparseable', 'Unparseable'],
  ['no_answer', 'No answer'], ['timeout', 'Timed out'],
];
const ALWAYS = 7;  // the filters after these appear only where a prompt has them
const VERDICTS = {
  correct: ['\u2713', 'correct', 'good'],
  wrong: ['\u2715', 'wrong', 'bad'],
  unparseable_answer: ['?', 'no answer read', 'doubt'],
  unparseable_gold: ['?', 'gold unreadable', 'doubt'],
  timeout: ['\u2026', 'timed out', 'doubt'],
};
const PER_PAGE = 10;
const LONG = 900;  // characters of a prompt before it is folded

const view = {choice: null, prompts: [], filter: 'all', query: null, page: 0};

function startBrowser() {
  const browser = document.getElementById('browser');
  if (!data.choices.length) {
    browser.append(element('p', {class: 'empty'}, 'No samples or evaluations yet.'));
    return;
  }
  const select = element('select', {id: 'choice'}, ...data.choices.map((choice, i) =>
    element('option', {value: i}, choice.label)));
  const search = element('input', {id: 'search', type: 'search', autocomplete: 'off',
    placeholder: 'Text, answer or prompt id', spellcheck: 'false'});
  view.filters = element('fieldset', {class: 'filters'});
  view.shown = element('p', {id: 'shown', class: 'shown'});
  view.list = element('div', {id: 'prompts'});
  view.top = element('nav', {class: 'pager', 'aria-label': 'Pages of prompts'});
  view.bottom = element('nav', {class: 'pager', 'aria-label': 'Pages of prompts, below the list'});
  view.status = element('p', {id: 'status', class: 'status', role: 'status'});
  browser.append(
    element('div', {class: 'controls'},
      element('div', {class: 'field'}, element('label', {for: 'choice'}, 'Iteration'), select),
      element('div', {class: 'field grow'}, element('label', {for: 'search'}, 'Search'), search)),
    view.filters, view.shown, element('div', {class: 'bar-line'}, view.status, view.top), view.list,
    view.bottom);
  select.addEventListener('change', () => choose(data.choices[Number(select.value)]));
  let timer = null;
  search.addEventListener('input', () => {
    clearTimeout(timer);
    timer = setTimeout(() => {
      const escaped = search.value.replace(/[\\^$.*+?()[\]{}|/]/g, '\\$&');
      Object.assign(view, {query: escaped ? new RegExp(escaped, 'iu') : null, page: 0});
      list();
    }, 120);
  });
  // The newest samples are what a reader of a running job comes for.
  const newest = Math.max(0, data.choices.findLastIndex((c) => c.id.startsWith('samples-')));
  select.value = newest;
  choose(data.choices[newest]);
}

function choose(choice) {
  const prompts = JSON.parse(document.getElementById(choice.id).textContent);
  Object.assign(view, {choice, prompts, page: 0});
  const count = (key) => key === 'all' ? prompts.length :
    prompts.filter((prompt) => prompt.tags.includes(key)).length;
  const offered = FILTERS.filter(([key], i) => i < ALWAYS || choice.counts[key]);
  if (!offered.some(([key]) => key === view.filter)) view.filter = 'all';
  view.filters.replaceChildren(element('legend', {}, 'Prompts'), ...offered.map(([key, label]) => {
    const radio = element('input', {type: 'radio', name: 'filter', value: key,
      id: `filter-${key}`, checked: key === view.filter});
    radio.addEventListener('change', () => {
      Object.assign(view, {filter: key, page: 0});
      list();
    });
    return element('label', {class: 'chip', for: `filter-${key}`}, radio, element('span', {}, label,
      ' ', element('b', {}, whole(count(key)))));
  }));
  const all = offered.filter(([key]) => choice.counts[key]).map(([key, label]) =>
    `${label.toLowerCase()} ${whole(choice.counts[key])}`).join(', ');
  view.shown.textContent = choice.shown === choice.total ?
    `Showing all ${counted(choice.total, 'prompt')}.` :
    `Showing ${whole(choice.shown)} of ${counted(choice.total, 'prompt')}, chosen evenly in file ` +
    'order; filters and search look at these.' + (all ? ` In the whole table: ${all}.` : '');
  list();
}

function matches(prompt) {
  if (view.filter !== 'all' && !prompt.tags.includes(view.filter)) return false;
  if (!view.query) return true;
  const found = (text) => text != null && view.query.test(text);
  return found(prompt.id) || found(prompt.prompt) || found(prompt.gold) ||
    prompt.samples.some((sample) => found(sample.response) || found(sample.answer));
}

function list() {
  const found = view.prompts.filter(matches);
  const pages = Math.max(1, Math.ceil(found.length / PER_PAGE));
  view.page = Math.min(view.page, pages - 1);
  const first = view.page * PER_PAGE;
  const page = found.slice(first, first + PER_PAGE);
  view.status.textContent = found.length ?
    `Prompts ${whole(first + 1)}\u2013${whole(first + page.length)} of ${whole(found.length)}` :
    'No prompt matches.';
  view.list.replaceChildren(...page.map(promptCard));
  for (const [nav, below] of [[view.top, false], [view.bottom, true]]) {
    const go = (words, to) => {
      const button = element('button', {type: 'button', disabled: to < 0 || to >= pages}, words);
      button.addEventListener('click', () => {
        view.page = to;
        list();
        if (below) document.getElementById('samples').scrollIntoView();
        const again = [...nav.querySelectorAll('button')];
        (again.find((b) => b.textContent === words && !b.disabled) ||
          again.find((b) => !b.disabled))?.focus({preventScroll: true});
      });
      return button;
    };
    nav.replaceChildren(go('Previous', view.page - 1),
      element('span', {}, `${view.page + 1} / ${pages}`), go('Next', view.page + 1));
    nav.hidden = pages === 1;
  }
}

function promptCard(prompt) {
  const correct = prompt.samples.filter((sample) => sample.verdict === 'correct').length;
  const scored = prompt.samples.some((sample) => sample.verdict != null);
  const roles = rolesOf(prompt);
  const rows = prompt.samples.map((sample) => sampleRow(sample, roles.get(sample.index) || []));
  const strip = element('div', {class: 'strip', 'aria-hidden': 'true'},
    ...prompt.samples.map((sample) =>
      element('i', {class: VERDICTS[sample.verdict]?.[2] ?? 'none'})));
  const toggle = element('button', {type: 'button', class: 'quiet'}, 'Open all');
  toggle.addEventListener('click', () => {
    const open = rows.some((row) => !row.open);
    rows.forEach((row) => { row.open = open; });
    toggle.textContent = open ? 'Close all' : 'Open all';
  });
  return element('article', {class: 'prompt', 'aria-label': `Prompt ${prompt.id}`},
    element('header', {},
      show(element('h3', {}), String(prompt.id), view.query),
      element('p', {class: 'gold'}, 'gold ', prompt.gold == null ?
        element('em', {}, 'none') : show(element('bdi', {}), prompt.gold, view.query))),
    foldable(prompt.prompt ?? ''),
    element('div', {class: 'tally'}, strip,
      element('span', {}, scored ? `${correct} of ${prompt.samples.length} correct` :
        `${counted(prompt.samples.length, 'sample')}, not scored`), toggle),
    element('div', {class: 'samples'}, ...rows),
    pairList(prompt));
}

function foldable(text) {
  const body = show(element('div', {class: 'text prompt-text'}), text, view.query);
  const found = view.query && view.query.test(text);
  if (found || (text.length <= LONG && text.split('\n').length <= 14)) return body;
  body.classList.add('folded');
  const button = element('button', {type: 'button', class: 'quiet', 'aria-expanded': 'false'},
    `Show the whole prompt (${whole(text.length)} characters)`);
  button.addEventListener('click', () => {
    const folded = body.classList.toggle('folded');
    button.setAttribute('aria-expanded', String(!folded));
    button.textContent = folded ? `Show the whole prompt (${whole(text.length)} characters)` :
      'Fold the prompt';
  });
  return element('div', {}, body, button);
}

// sample index -> [{side, why}] for every pair that the sample is part of
function rolesOf(prompt) {
  const roles = new Map();
  for (const pair of prompt.pairs) {
    for (const side of ['chosen', 'rejected']) {
      if (pair[side] == null) continue;
      if (!roles.has(pair[side])) roles.set(pair[side], []);
      roles.get(pair[side]).push({side, why: pair[`${side}_why`]});
    }
  }
  return roles;
}

function badge(verdict) {
  const [sign, words, color] = VERDICTS[verdict] ?? ['\u2013', verdict ?? 'not scored', 'none'];
  return element('span', {class: `badge ${color}`}, element('span', {'aria-hidden': 'true'}, sign),
    ` ${words}`);
}

function sampleRow(sample, roles) {
  const facts = [];
  if (sample.length != null) facts.push(counted(sample.length, 'token'));
  if (sample.sum != null) {
    facts.push(`log-prob ${short(sample.sum)}, mean ${fixed(sample.mean)}`);
  }
  if (sample.finish != null) facts.push(`ended by ${sample.finish}`);
  if (sample.votes != null) facts.push(counted(sample.votes, 'vote'));
  const summary = element('summary', {},
    element('span', {class: 'index'}, sample.kind === 'greedy' ? 'greedy' : `#${sample.index}`),
    badge(sample.verdict),
    sample.answer == null ? null :
      show(element('bdi', {class: 'answer'}), sample.answer, view.query),
    ...['chosen', 'rejected'].map((side) => {
      const count = roles.filter((role) => role.side === side).length;
      return count ? element('span', {class: `role ${side}`},
        count > 1 ? `${side} \u00d7${count}` : side) : null;
    }),
    element('span', {class: 'facts'}, facts.join(' \u00b7 '),
      sample.finish === 'length' ? element('span', {class: 'cut'}, 'truncated') : null));
  const row = element('details', {class: 'sample'}, summary);
  const fill = () => {
    if (row.children.length > 1) return;
    row.append(show(element('div', {class: 'text response'}), sample.response ?? '', view.query));
    if (!sample.response) row.lastChild.append(element('em', {}, 'empty response'));
    const said = new Set(roles.map(({side, why}) => `${side} ${why ?? 'for no recorded reason'}`));
    for (const words of said) {
      const side = words.slice(0, words.indexOf(' '));
      row.append(show(element('p', {class: `why ${side}`}, element('b', {}, side)),
        words.slice(side.length), null));
    }
  };
  row.addEventListener('toggle', () => { if (row.open) fill(); });
  if (view.query && sample.response != null && view.query.test(sample.response)) {
    fill();
    row.open = true;
  }
  return row;
}

function pairList(prompt) {
  if (!prompt.pairs.length) return null;
  const side = (pair, name) => {
    const earlier = pair[`${name}_earlier`];
    const facts = [pair[name] != null ? `#${pair[name]}` :
      earlier != null ? `#${earlier} of an earlier iteration` :
        name === 'chosen' ? 'gold solution' : 'not a sample'];
    if (pair[name] == null && pair[`${name}_length`] != null) {
      facts.push(counted(pair[`${name}_length`], 'token'));
    }
    if (pair[`${name}_reference`] != null) {
      facts.push(`reference log-prob ${short(pair[`${name}_reference`])}`);
    }
    return element('div', {class: `side ${name}`},
      element('p', {}, element('span', {class: `role ${name}`}, name), ' ', facts.join(' \u00b7 ')),
      show(element('p', {class: 'reason'}), pair[`${name}_why`] ?? 'no reason recorded', null));
  };
  const many = prompt.pairs.length;
  return element('details', {class: 'pair-list', open: many <= 2},
    element('summary', {}, counted(many, 'preference pair')),
    element('ol', {}, ...prompt.pairs.map((pair) => element('li', {},
      side(pair, 'chosen'), side(pair, 'rejected'),
      pair.weight == null || pair.weight === 1 ? null :
        element('p', {class: 'weight'}, `weight ${short(pair.weight)}`)))));
}

drawResults();
drawTraining();
startBrowser();

// Small charts as SVG, redrawn to the width they are given so that text stays readable on a phone.
// All text enters through text nodes; colours come from the style sheet by class (c0, c1, ...).

function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === true) node.setAttribute(key, '');
    else if (value !== false && value != null) node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

function shape(name, attributes = {}, ...children) {
  const node = document.createElementNS('http://www.w3.org/2000/svg', name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

// ---- numbers

function short(value) {
  if (value == null) return 'not finite';
  const size = Math.abs(value);
  if (size !== 0 && (size >= 1e6 || size < 1e-3)) {
    return value.toExponential(1).replace('-', '\u2212');
  }
  const digits = size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : 3;
  return value.toLocaleString('en', {maximumFractionDigits: digits}).replace('-', '\u2212');
}

const fixed = (value) => value == null ? 'not finite' :
  value.toFixed(3).replace('-', '\u2212');
const whole = (value) => value == null ? 'unknown' : value.toLocaleString('en');
const counted = (n, noun) => `${whole(n)} ${noun}${n === 1 ? '' : 's'}`;
const percent = (value) => value == null ? 'unknown' : `${(100 * value).toFixed(1)}%`;

function duration(seconds) {
  if (seconds < 60) return `${short(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 60 ? `${short(seconds / 60)} min` : `${short(seconds / 3600)} h`;
}

// Round numbers between low and high, about `count` of them.
function ticks(low, high, count) {
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].findLast((m) => m * power <= rough * 1.4);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) {
    found.push(Number((i * step).toPrecision(12)));
  }
  return found;
}

function extent(values, {floor = null, ceiling = null} = {}) {
  const known = values.filter((v) => v != null);
  let low = Math.min(...known), high = Math.max(...known);
  const pad = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  low -= pad;
  high += pad;
  if (floor != null) low = Math.max(floor, low);
  if (ceiling != null) high = Math.min(ceiling, high);
  return low < high ? [low, high] : [low - 1, high + 1];
}

// ---- the frame around a chart

const charts = [];

// draw(width) -> {svg, stops: [{x, text}], top, bottom} for the given number of pixels.
function chart(parent, {title, note, legend = [], table, draw}) {
  const plot = element('div', {class: 'plot'});
  const readout = element('p', {class: 'readout', 'aria-live': 'polite'});
  const keys = element('ul', {class: 'legend'}, ...legend.map(({label, color, dashed}) =>
    element('li', {}, element('span', {class: `key ${color}${dashed ? ' dashed' : ''}`}), label)));
  const numbers = element('details', {class: 'numbers'}, element('summary', {}, 'Numbers'));
  numbers.addEventListener('toggle', () => {
    if (numbers.open && numbers.children.length === 1) numbers.append(tableOf(title, table));
  });
  const figure = element('figure', {class: 'chart'},
    element('figcaption', {}, element('h3', {}, title), note ? element('p', {}, note) : null),
    legend.length > 1 ? keys : null, plot, readout, numbers);
  parent.append(figure);
  const state = {plot, readout, draw, title, width: 0, at: null};
  charts.push(state);
  new ResizeObserver(() => redraw(state)).observe(plot);
  plot.addEventListener('pointermove', (event) => {
    if (!state.stops.length) return;
    const x = event.clientX - plot.getBoundingClientRect().left;
    const distance = state.stops.map((stop) => Math.abs(stop.x - x));
    point(state, distance.indexOf(Math.min(...distance)));
  });
  plot.addEventListener('pointerleave', () => point(state, null));
  plot.addEventListener('blur', () => point(state, null));
  plot.addEventListener('keydown', (event) => {
    const last = state.stops.length - 1;
    const at = state.at ?? (event.key === 'ArrowLeft' ? last + 1 : -1);
    const to = {ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: last}[event.key];
    if (to === undefined || last < 0) return;
    event.preventDefault();
    point(state, Math.max(0, Math.min(last, to)));
  });
  redraw(state);
}

function redraw(state) {
  const width = Math.floor(state.plot.clientWidth);
  if (!width || width === state.width) return;
  const drawn = state.draw(width);
  Object.assign(state, {width, at: null, stops: drawn.stops || []});
  state.cursor = shape('line', {class: 'cursor', y1: drawn.top || 0, y2: drawn.bottom || 0});
  drawn.svg.append(state.cursor);
  drawn.svg.setAttribute('role', 'img');
  drawn.svg.setAttribute('aria-label', `${state.title}. ${drawn.label}`);
  state.plot.replaceChildren(drawn.svg);
  if (state.stops.length) {
    state.plot.setAttribute('tabindex', '0');
    state.plot.setAttribute('role', 'group');
    state.plot.setAttribute('aria-label', `${state.title}: left and right arrow keys read values`);
    state.readout.hidden = false;
  } else {
    state.readout.hidden = true;
  }
  point(state, null);
}

function point(state, at) {
  if (!state.stops) return;
  state.at = at;
  const stop = at == null ? null : state.stops[at];
  state.cursor.setAttribute('visibility', stop ? 'visible' : 'hidden');
  if (stop) for (const end of ['x1', 'x2']) state.cursor.setAttribute(end, stop.x);
  // Without a pointer the last value is read, which is the one most asked for.
  const read = stop ?? state.stops[state.stops.length - 1];
  state.readout.textContent = read ? read.text : '';
  state.readout.classList.toggle('resting', !stop);
}

function tableOf(title, {head, rows}) {
  const cells = (tag, values) => values.map((value) => element(tag, {}, String(value ?? '')));
  return element('div', {class: 'scroll', tabindex: '0', role: 'region', 'aria-label': title},
    element('table', {},
      element('thead', {}, element('tr', {}, ...cells('th', head))),
      element('tbody', {}, ...rows.map((row) => element('tr', {}, ...cells('td', row))))));
}

// Horizontal grid lines with labels; returns the y scale and the left edge of the plot.
function yAxis(svg, width, {low, high, top, bottom, format}) {
  const marks = ticks(low, high, (bottom - top) / 44);
  const labels = marks.map(format);
  const left = 10 + 6.6 * Math.max(...labels.map((label) => label.length));
  const y = (value) => bottom - (value - low) / (high - low) * (bottom - top);
  marks.forEach((mark, i) => {
    svg.append(
      shape('line', {class: 'grid', x1: left, x2: width - 6, y1: y(mark), y2: y(mark)}),
      shape('text', {class: 'tick end', x: left - 6, y: y(mark) + 4}, labels[i]));
  });
  return {y, left};
}

function path(points) {
  let d = '', drawing = false;
  for (const [x, y] of points) {
    if (y == null) {
      drawing = false;
      continue;
    }
    d += `${drawing ? 'L' : 'M'}${x.toFixed(1)} ${y.toFixed(1)}`;
    drawing = true;
  }
  return d;
}

// ---- one value per iteration, with intervals

function intervalChart(parent, {title, note, rows, series, format}) {
  const values = rows.flatMap((row) => series.flatMap((s) => [row[s.key], row[`${s.key}_low`],
    row[`${s.key}_high`]]));
  const [low, high] = extent(values, {floor: 0, ceiling: 1});
  const describe = (row, s) => row[s.key] == null ? null :
    `${s.label} ${format(row[s.key])}` + (row[`${s.key}_low`] == null ? '' :
      ` (${format(row[`${s.key}_low`])} to ${format(row[`${s.key}_high`])})`);
  const line = (row) => [`iteration ${row.iteration}`, ...series.map((s) => describe(row, s))]
    .filter(Boolean).join(' \u00b7 ');
  chart(parent, {
    title, note,
    legend: series.map((s) => ({label: s.label, color: s.color})),
    table: {
      head: ['Iteration', 'Prompts', ...series.flatMap((s) => [s.label, 'low', 'high'])],
      rows: rows.map((row) => [row.iteration, row.n, ...series.flatMap((s) =>
        ['', '_low', '_high'].map((end) => row[s.key + end] == null ? '' :
          format(row[s.key + end])))]),
    },
    draw(width) {
      const height = 250, top = 10, bottom = height - 26;
      const svg = shape('svg', {width, height, viewBox: `0 0 ${width} ${height}`});
      const {y, left} = yAxis(svg, width, {low, high, top, bottom, format: (v) =>
        `${Math.round(100 * v)}%`});
      const slot = (width - 6 - left) / rows.length;
      const x = (i) => left + slot * (i + 0.5);
      const every = Math.ceil(rows.length / ((width - left) / 30));
      rows.forEach((row, i) => {
        if (i % every === 0) {
          svg.append(shape('text', {class: 'tick middle', x: x(i), y: height - 6}, row.iteration));
        }
      });
      series.forEach((s, k) => {
        const shift = (k - (series.length - 1) / 2) * Math.min(10, slot / 4);
        const group = shape('g', {class: s.color});
        group.append(shape('path', {class: 'line', d: path(rows.map((row, i) =>
          [x(i) + shift, row[s.key] == null ? null : y(row[s.key])]))}));
        rows.forEach((row, i) => {
          if (row[s.key] == null) return;
          const at = x(i) + shift;
          if (row[`${s.key}_low`] != null) {
            const [a, b] = [y(row[`${s.key}_high`]), y(row[`${s.key}_low`])];
            group.append(shape('path', {class: 'whisker', d:
              `M${at} ${a}V${b}M${at - 4} ${a}H${at + 4}M${at - 4} ${b}H${at + 4}`}));
          }
          group.append(shape('circle', {class: 'dot', cx: at, cy: y(row[s.key]), r: 4}));
        });
        svg.append(group);
      });
      const stops = rows.map((row, i) => ({x: x(i), text: line(row)}));
      return {svg, stops, top, bottom, label: rows.map(line).join('; ')};
    },
  });
}

// ---- curves over steps

// Mean of each value with its neighbours of the same iteration; nulls are left out.
function smooth(values, groups, reach) {
  return values.map((_, i) => {
    let total = 0, count = 0;
    for (let j = Math.max(0, i - reach); j <= Math.min(values.length - 1, i + reach); j++) {
      if (values[j] != null && groups[j] === groups[i]) {
        total += values[j];
        count += 1;
      }
    }
    return count ? total / count : null;
  });
}

function stepChart(parent, training, {title, series, zero, ceiling, floor}) {
  const {steps, iterations, starts} = training;
  const reach = steps.length > 80 ? Math.round(steps.length / 80) : 0;
  const notes = [];
  if (reach) notes.push(`Bold: mean over ${2 * reach + 1} points.`);
  if (training.per_point > 1) notes.push(`Each point: mean of ${training.per_point} records.`);
  const broken = series.reduce((sum, s) => sum + (training.nonfinite[s.key] || 0), 0);
  if (broken) notes.push(`${counted(broken, 'value')} not finite, left out.`);
  const values = series.flatMap((s) => training.series[s.key]);
  if (!values.some((v) => v != null)) return;
  const [low, high] = extent(zero ? [...values, 0] : values, {floor, ceiling});
  const line = (i) => [`step ${whole(steps[i])}`, `iteration ${iterations[i]}`, ...series.map((s) =>
    (series.length > 1 ? `${s.label} ` : '') + short(training.series[s.key][i]))].join(' \u00b7 ');
  chart(parent, {
    title,
    note: notes.length ? notes.join(' ') : null,
    legend: series.map((s) => ({label: s.label, color: s.color})),
    table: {
      head: ['Step', 'Iteration', ...series.map((s) => s.label)],
      rows: steps.map((step, i) => [step, iterations[i], ...series.map((s) =>
        training.series[s.key][i])]),
    },
    draw(width) {
      const height = 210, top = 20, bottom = height - 26;
      const svg = shape('svg', {width, height, viewBox: `0 0 ${width} ${height}`});
      const {y, left} = yAxis(svg, width, {low, high, top, bottom, format: short});
      const first = starts[0].step, last = steps[steps.length - 1];
      const room = width - left - 14;
      const x = (step) => left + 6 + (step - first) / Math.max(1, last - first) * room;
      for (const mark of ticks(first, Math.max(last, first + 1), (width - left) / 70)) {
        if (!Number.isInteger(mark) || mark > last) continue;
        svg.append(shape('text', {class: 'tick middle', x: Math.min(x(mark), width - 14),
          y: height - 6}, whole(mark)));
      }
      let free = -Infinity;
      for (const {iteration, step} of starts) {
        svg.append(shape('line', {class: 'boundary', x1: x(step), x2: x(step), y1: 6, y2: bottom}));
        const words = `iteration ${iteration}`, end = x(step) + 6.4 * words.length;
        if (x(step) > free && end < width) {
          svg.append(shape('text', {class: 'tick', x: x(step) + 4, y: 14}, words));
          free = end;
        }
      }
      if (zero && low < 0 && high > 0) {
        svg.append(shape('line', {class: 'zero', x1: left, x2: width - 6, y1: y(0), y2: y(0)}));
      }
      for (const s of series) {
        const draw = (kind, found) => {
          const points = [];
          found.forEach((value, i) => {
            if (i && iterations[i] !== iterations[i - 1]) points.push([0, null]);
            points.push([x(steps[i]), value == null ? null : y(value)]);
          });
          svg.append(shape('path', {class: `${kind} ${s.color}`, d: path(points)}));
          points.forEach(([at, to], i) => {  // a point between two gaps has no line to show it
            const alone = (j) => points[j] === undefined || points[j][1] == null;
            if (to != null && alone(i - 1) && alone(i + 1)) {
              svg.append(shape('circle', {class: `dot ${s.color}`, cx: at, cy: to, r: 3}));
            }
          });
        };
        const found = training.series[s.key];
        if (reach) draw('faint', found);
        draw('line', reach ? smooth(found, iterations, reach) : found);
      }
      const stops = steps.map((step, i) => ({x: x(step), text: line(i)}));
      return {svg, stops, top: 6, bottom, label: `Last: ${line(steps.length - 1)}`};
    },
  });
}

// ---- horizontal stacked bars, one per iteration

function barChart(parent, {title, note, rows, parts, format, share}) {
  const used = parts.filter((part) => rows.some((row) => row.values[part.key]));
  const total = (row) => used.reduce((sum, part) => sum + (row.values[part.key] || 0), 0);
  const most = Math.max(...rows.map(total)) || 1;
  const line = (row) => `${row.label}: ` + used.filter((part) => row.values[part.key])
    .map((part) => `${part.label} ${format(row.values[part.key])}`).join(', ');
  chart(parent, {
    title, note,
    legend: used,
    table: {
      head: ['', ...used.map((part) => part.label), 'total'],
      rows: rows.map((row) => [row.label, ...used.map((part) =>
        format(row.values[part.key] || 0)), format(total(row))]),
    },
    draw(width) {
      const rowHeight = 44, height = rowHeight * rows.length + 4;
      const svg = shape('svg', {width, height, viewBox: `0 0 ${width} ${height}`});
      rows.forEach((row, i) => {
        const top = i * rowHeight, sum = total(row);
        svg.append(
          shape('text', {class: 'tick', x: 0, y: top + 13}, row.label),
          shape('text', {class: 'tick end', x: width, y: top + 13}, format(sum)));
        let x = 0;
        for (const part of used) {
          const value = row.values[part.key] || 0;
          const size = value / ((share ? sum : most) || 1) * width;
          if (!value) continue;
          const bar = shape('g', {class: part.color},
            shape('title', {}, `${row.label}, ${part.label}: ${format(value)}`),
            shape('rect', {class: 'bar', x, y: top + 18, height: 20,
              width: Math.max(1, size - 1)}));
          const words = format(value);
          if (size > 7 * words.length + 10) {
            bar.append(shape('text', {class: 'on-bar', x: x + size / 2, y: top + 32}, words));
          }
          svg.append(bar);
          x += size;
        }
      });
      return {svg, stops: [], label: rows.map(line).join('; ')};
    },
  });
}

// ---- quantile boxes, several groups per iteration

function boxChart(parent, {title, note, rows, groups}) {
  const iterations = [...new Set(rows.map((row) => row.iteration))];
  const used = groups.filter((group) => rows.some((row) => row.group === group.key));
  const high = Math.max(...rows.map((row) => row.quantiles[4])) * 1.06 || 1;
  const find = (iteration, group) =>
    rows.find((row) => row.iteration === iteration && row.group === group.key);
  const line = (iteration) => `iteration ${iteration} \u00b7 ` + used.map((group) => {
    const row = find(iteration, group);
    return row && `${group.label} ${short(row.quantiles[2])} (${short(row.quantiles[1])} to ` +
      `${short(row.quantiles[3])})`;
  }).filter(Boolean).join(' \u00b7 ');
  chart(parent, {
    title, note,
    legend: used,
    table: {
      head: ['Iteration', 'Group', 'n', '5%', '25%', 'median', '75%', '95%', 'mean', 'max'],
      rows: rows.map((row) => [row.iteration, row.group, row.n, ...row.quantiles.map(short),
        short(row.mean), row.max]),
    },
    draw(width) {
      const height = 250, top = 10, bottom = height - 26;
      const svg = shape('svg', {width, height, viewBox: `0 0 ${width} ${height}`});
      const {y, left} = yAxis(svg, width, {low: 0, high, top, bottom, format: short});
      const slot = (width - 6 - left) / iterations.length;
      const box = Math.min(26, slot * 0.8 / used.length);
      const every = Math.ceil(iterations.length / ((width - left) / 30));
      iterations.forEach((iteration, i) => {
        const centre = left + slot * (i + 0.5);
        if (i % every === 0) {
          svg.append(shape('text', {class: 'tick middle', x: centre, y: height - 6}, iteration));
        }
        used.forEach((group, k) => {
          const row = find(iteration, group);
          if (!row) return;
          const at = centre + (k - (used.length - 1) / 2) * box, half = box / 2 - 2;
          const [q5, q25, q50, q75, q95] = row.quantiles.map(y);
          svg.append(shape('g', {class: group.color},
            shape('path', {class: 'whisker', d: `M${at} ${q5}V${q25}M${at} ${q75}V${q95}`}),
            shape('rect', {class: 'box', x: at - half, y: q75, width: 2 * half,
              height: Math.max(1, q25 - q75)}),
            shape('path', {class: 'median', d: `M${at - half} ${q50}H${at + half}`})));
        });
      });
      const stops = iterations.map((iteration, i) =>
        ({x: left + slot * (i + 0.5), text: line(iteration)}));
      return {svg, stops, top, bottom, label: iterations.map(line).join('; ')};
    },
  });
}

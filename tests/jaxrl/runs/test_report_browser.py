"""The report in headless Chromium: it opens, it filters, and the texts of models stay text."""

import shutil

import pytest

from jaxrl.runs import report, report_tables
from tests.jaxrl.runs import report_run

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser')
DRIVER = shutil.which('chromedriver')
if not (CHROMIUM and DRIVER):
  pytest.skip('Chromium and its driver are not installed', allow_module_level=True)

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

ALL_OPEN = """
for (const node of document.querySelectorAll('details')) node.open = true;
"""
# What sticks out of the window to the right and is not inside an element that scrolls by itself.
OVERFLOWING = """
const scrolls = (node) => node.closest('.scroll') !== null;
return [...document.querySelectorAll('body *')]
  .filter((node) => node.getBoundingClientRect().right > innerWidth + 0.5 && !scrolls(node))
  .map((node) => `${node.tagName} ${node.getAttribute('class')}`)
  .concat(document.documentElement.scrollWidth > innerWidth ? ['the page'] : []);
"""


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
  options = webdriver.ChromeOptions()
  options.binary_location = CHROMIUM
  for flag in (
      '--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
      '--disable-background-networking', '--disable-component-update', '--disable-sync',
      '--disable-dev-shm-usage', f'--user-data-dir={tmp_path_factory.mktemp("profile")}',
  ):  # fmt: skip
    options.add_argument(flag)
  options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
  driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
  yield driver
  driver.quit()


@pytest.fixture(scope='module')
def run_dir(tmp_path_factory):
  folder = report_run.write_run(
      tmp_path_factory.mktemp('runs') / 'demo', iterations=2, prompts=24, n_samples=4, steps=50
  )
  report.write_report(folder)
  return folder


@pytest.fixture(scope='module')
def choices(run_dir):
  found = report.gather(report.epath.Path(run_dir), max_prompts=200, max_bytes=10**7)['choices']
  return {choice['label']: choice for choice in found}


def resize(browser, width, height=900):
  browser.execute_cdp_cmd(
      'Emulation.setDeviceMetricsOverride',
      {'width': width, 'height': height, 'deviceScaleFactor': 1, 'mobile': width < 500},
  )


@pytest.fixture
def page(browser, run_dir):
  """The page of the demo run on a desktop, freshly opened; nothing may be logged while it is."""
  resize(browser, 1280)
  browser.get((run_dir / 'report.html').as_uri())
  yield browser
  assert browser.get_log('browser') == []
  assert browser.execute_script('return window.harmed') is None


def find(browser, selector):
  return browser.find_elements(By.CSS_SELECTOR, selector)


def choose(browser, label):
  Select(browser.find_element(By.ID, 'choice')).select_by_visible_text(label)


def choose_filter(browser, name):
  browser.find_element(By.ID, f'filter-{name}').click()


def status(browser):
  return browser.find_element(By.ID, 'status').text


def listed(browser):
  """Prompt ids over all pages of the list."""
  found = []
  while True:
    found += [node.text for node in find(browser, '#prompts > article > header > h3')]
    following = find(browser, '.bar-line .pager button')
    if not following or not following[1].is_enabled():
      return found
    following[1].click()


def search(browser, text):
  field = browser.find_element(By.ID, 'search')
  field.clear()
  before = browser.find_element(By.ID, 'prompts').find_elements(By.CSS_SELECTOR, 'article')
  field.send_keys(text)

  def redrawn(_):
    after = find(browser, '#prompts > article')
    return not before or not after or after[0] != before[0]

  WebDriverWait(browser, 5).until(redrawn)


def test_every_chart_is_drawn_and_described(page):
  titles = [node.text for node in find(page, 'figure h3')]
  assert titles == [
      'Test accuracy by iteration', 'Response length in tokens, by iteration',
      'Training prompts by outcome of their samples', 'Time in each stage', 'Loss',
      'Reward margin, chosen over rejected', 'Pairs ranked right',
      'Log-probability of the responses', 'Gradient norm',
  ]  # fmt: skip
  assert len(find(page, 'figure svg[role=img][aria-label]')) == len(titles)
  assert 'NaN' not in page.page_source.split('application/json')[0]
  assert not [d for d in (node.get_attribute('d') for node in find(page, 'figure path')) if not d]


def test_arrow_keys_read_values_from_a_chart(page):
  plot = find(page, 'figure .plot')[4]
  readout = find(page, 'figure .readout')[4]
  assert readout.text.startswith('step 99')
  plot.send_keys(Keys.HOME)
  assert readout.text.startswith('step 0 · iteration 1 · loss ')
  plot.send_keys(Keys.ARROW_RIGHT)
  assert readout.text.startswith('step 1 · iteration 1')
  plot.send_keys(Keys.END)
  assert readout.text.startswith('step 99 · iteration 2')


def test_numbers_of_a_chart_are_a_table(page):
  details = find(page, 'figure .numbers')[0]
  details.find_element(By.TAG_NAME, 'summary').click()
  WebDriverWait(page, 5).until(lambda _: details.find_elements(By.TAG_NAME, 'table'))
  assert len(details.find_elements(By.CSS_SELECTOR, 'tbody tr')) == 3


def test_selector_offers_every_table(page, choices):
  select = Select(page.find_element(By.ID, 'choice'))
  assert [option.text for option in select.options] == list(choices)
  assert select.first_selected_option.text == 'Iteration 2: samples'
  for label, choice in choices.items():
    choose(page, label)
    assert listed(page) == [prompt['id'] for prompt in choice['prompts']]


def test_each_filter_lists_its_prompts(page, choices):
  label = 'Iteration 1: samples'
  choose(page, label)
  names = [node.get_attribute('value') for node in find(page, '.filters input')]
  assert names == ['all', 'all_correct', 'mixed', 'all_wrong', 'truncated', 'pairs', 'unparseable',
                   'timeout']  # fmt: skip
  lengths = {}
  for name in names:
    choose_filter(page, name)
    prompts = choices[label]['prompts']
    expected = [p['id'] for p in prompts if name == 'all' or name in p['tags']]
    chip = page.find_element(By.CSS_SELECTOR, f'label[for=filter-{name}] b').text
    assert int(chip) == len(expected)
    assert listed(page) == expected
    assert (status(page) == 'No prompt matches.') == (not expected)
    lengths[name] = len(expected)
  assert all(lengths[name] for name in ('mixed', 'truncated', 'pairs', 'unparseable', 'timeout'))


def test_pages_of_prompts(page):
  assert status(page) == 'Prompts 1–10 of 24'
  following = find(page, '.bar-line .pager button')[1]
  following.click()
  assert status(page) == 'Prompts 11–20 of 24'
  assert page.switch_to.active_element.text == 'Next', 'focus stays for the next press'
  page.switch_to.active_element.send_keys(Keys.ENTER)
  assert status(page) == 'Prompts 21–24 of 24'
  assert not find(page, '.bar-line .pager button')[1].is_enabled()
  choose(page, 'Iteration 0: evaluation')
  assert status(page) == 'Prompts 1–10 of 24'


def test_search_finds_text_as_it_is_typed_and_marks_it(page):
  choose(page, 'Iteration 1: samples')
  search(page, '<SCRIPT>window.')
  assert listed(page) == ['train-0000']
  marks = {node.text for node in find(page, 'mark')}
  assert marks == {'<script>window.'}
  assert find(page, 'details.sample')[0].get_attribute('open') == 'true'
  search(page, '$\\frac{')   # a pattern's special characters are plain text here
  assert listed(page) == ['train-0004']
  search(page, 'no such text')
  assert status(page) == 'No prompt matches.'


def test_a_prompt_shows_samples_reasons_and_pairs(page, choices):
  label = 'Iteration 1: samples'
  choose(page, label)
  choose_filter(page, 'mixed')
  prompt = next(p for p in choices[label]['prompts'] if 'mixed' in p['tags'])
  card = find(page, '#prompts > article')[0]
  assert prompt['gold'] in card.find_element(By.CSS_SELECTOR, '.gold').text
  rows = card.find_elements(By.CSS_SELECTOR, 'details.sample')
  assert len(rows) == len(prompt['samples'])
  card.find_element(By.CSS_SELECTOR, '.tally button').click()
  WebDriverWait(page, 5).until(lambda _: all(
      row.find_elements(By.CSS_SELECTOR, '.response') for row in rows
  ))  # fmt: skip
  for row, sample in zip(rows, prompt['samples'], strict=True):
    text = row.text
    assert f'{sample["length"]} token' in text and f'ended by {sample["finish"]}' in text
    vote = f'{sample["votes"]} vote'
    assert vote in text and 'log-prob' in text
    response = row.find_element(By.CSS_SELECTOR, '.response').get_property('textContent')
    assert response == (sample['response'] or 'empty response')
  pair = prompt['pairs'][0]
  chosen = rows[[s['index'] for s in prompt['samples']].index(pair['chosen'])]
  assert 'chosen' in chosen.find_element(By.TAG_NAME, 'summary').text
  assert chosen.find_element(By.CSS_SELECTOR, '.why.chosen').text == f'chosen {pair["chosen_why"]}'
  choose_filter(page, 'all_wrong')
  listing = find(page, '.pair-list')[0]
  assert 'gold solution · 40 tokens · reference log-prob' in listing.text


def test_characters_that_hide_text_are_named(page):
  choose(page, 'Iteration 1: samples')
  card = find(page, '#prompts > article')[3]
  names = [node.text for node in card.find_elements(By.CSS_SELECTOR, '.prompt-text .hidden-char')]
  assert names == ['U+0000', 'U+001B', 'U+202E', 'U+202C', 'U+FEFF']


def test_markup_in_a_sample_stays_text(page, choices):
  for label in choices:
    choose(page, label)
    page.execute_script(ALL_OPEN)
  choose(page, 'Iteration 1: samples')
  page.execute_script(ALL_OPEN)
  WebDriverWait(page, 5).until(lambda _: len(find(page, '.response')) == 40)
  shown = [node.get_property('textContent') for node in find(page, '.response')]
  assert report_run.HOSTILE[0] in shown and report_run.HOSTILE[1] in shown
  assert not find(page, '#samples script, #samples img')


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_nothing_is_wider_than_a_phone(page, choices, scheme):
  features = [{'name': 'prefers-color-scheme', 'value': scheme}]
  page.execute_cdp_cmd('Emulation.setEmulatedMedia', {'features': features})
  resize(page, 375)
  page.refresh()
  colour = page.execute_script('return getComputedStyle(document.body).backgroundColor')
  assert (sum(map(int, colour[4:-1].split(','))) < 3 * 64) == (scheme == 'dark')
  for label in choices:
    choose(page, label)
    page.execute_script(ALL_OPEN)
    WebDriverWait(page, 5).until(lambda _: find(page, '.response'))
    assert page.execute_script(OVERFLOWING) == []
  page.execute_cdp_cmd('Emulation.setEmulatedMedia', {'features': []})


def test_charts_follow_the_width_of_the_window(page):
  def widths(_=None):
    return {int(svg.get_attribute('width')) for svg in find(page, 'figure svg')}

  wide = max(widths())
  resize(page, 375)
  WebDriverWait(page, 5).until(lambda _: max(widths()) <= 375)
  assert wide > 400


def test_controls_have_names(page):
  names = page.execute_script("""
    return [...document.querySelectorAll('select, input, button, summary, nav, [tabindex="0"]')]
      .filter((node) => !(node.labels && node.labels.length) && !node.textContent.trim() &&
        !node.getAttribute('aria-label')).map((node) => node.outerHTML);
  """)
  assert names == []


def test_a_script_that_is_not_the_pages_own_is_refused(browser, run_dir):
  browser.get((run_dir / 'report.html').as_uri())
  browser.execute_script("""
    const script = document.createElement('script');
    script.textContent = 'window.harmed = true';
    document.body.append(script);
  """)
  assert browser.execute_script('return window.harmed') is None
  assert 'Content Security Policy' in str(browser.get_log('browser'))


def test_a_page_that_shows_a_part_says_so(browser, run_dir, tmp_path):
  folder = shutil.copytree(run_dir, tmp_path / 'part')
  browser.get((report.write_report(folder, max_prompts=9)).as_uri())
  choose(browser, 'Iteration 1: samples')
  words = browser.find_element(By.ID, 'shown').text
  assert words.startswith('Showing 9 of 24 prompts, chosen evenly in file order')
  assert len(listed(browser)) == 9
  assert browser.get_log('browser') == []


@pytest.mark.parametrize('kept', [(), ('iteration_00',), ('metrics.jsonl',)])
def test_a_run_with_little_in_it_opens(browser, run_dir, tmp_path, kept):
  for name in kept:
    copy = shutil.copytree if (run_dir / name).is_dir() else shutil.copy
    copy(run_dir / name, tmp_path / name)
  browser.get(report.write_report(tmp_path).as_uri())
  assert bool(find(browser, '#choice')) == ('iteration_00' in kept)
  assert bool(find(browser, '#training-charts figure')) == ('metrics.jsonl' in kept)
  assert browser.get_log('browser') == []


def test_one_step_and_values_that_are_not_finite_are_drawn(browser, tmp_path):
  lines = ['{"iteration": 1, "stage": "train", "step": 1, "loss": 0.5, "grad_norm": null}']
  (tmp_path / 'metrics.jsonl').write_text('\n'.join(lines) + '\n')
  browser.get(report.write_report(tmp_path).as_uri())
  assert len(find(browser, '#training-charts figure')) == 1
  assert len(find(browser, '#training-charts circle')) == 1
  assert browser.get_log('browser') == []


def test_filters_know_every_outcome():
  script = report_page_script()
  assert all(f"key: '{name}'" in script for name in report_tables.OUTCOMES)


def report_page_script():
  return (report.epath.resource_path('jaxrl.runs') / 'report_assets' / 'page.js').read_text()

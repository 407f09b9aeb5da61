"""The calculator of the site says what `estimate_memory` says, to the byte, asks nothing of a server, and is for everybody."""

import json
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import chromium
import pytest
import torch

import leanvocab as lv
from docs.figures import draw_models, make_calculator, traced
from leanvocab.reports.memory_estimate import MemoryEstimate, format_bytes, format_ratio
from leanvocab.reports.state_bytes import OPTIMIZERS

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*:FutureWarning"  # peft 0.21 reads a name that transformers 5.23 has deprecated
)
REPOSITORY = Path(__file__).resolve().parents[2]
ASSETS = REPOSITORY / "docs" / "assets" / "calculator"
Choice = dict[str, Any]
# Small and large; without an output layer, tied, with one of its own, and with an encoder.
SAMPLE = ("FacebookAI/xlm-roberta-base", "google/gemma-3-270m", "Qwen/Qwen2.5-7B", "google/mt5-small")


def committed() -> Any:
    text = (ASSETS / "calculator-data.js").read_text()
    return json.loads(text[text.index("{") : text.rindex("}") + 1])


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


# --- formulas are traced ----------------------------------------------------------------------------------------------


def test_a_traced_formula_has_every_branch_of_its_function() -> None:
    def function(a: Any, b: Any) -> Any:
        if a == b:
            return -(-a // 4) * 2
        return max(1, min(a, 10)) + b if a < b else a - b

    tree = traced.traced(function, "a", "b")
    for a in range(1, 15):
        for b in range(1, 15):
            assert traced.evaluated(tree, a=a, b=b) == function(a, b)


def test_what_is_no_number_is_no_formula() -> None:
    with pytest.raises(TypeError, match="expected a number or a symbol in a traced formula, got 'a'"):
        traced.traced(lambda a: "a", "a")


def test_formulas_and_laws_of_optimizers_are_those_of_today() -> None:
    before, today = committed(), as_json(make_calculator.formulas())
    assert {name: value for name, value in before.items() if name != "models"} == today, "run `make figures`"


def test_models_are_those_of_the_list() -> None:
    assert list(committed()["models"]) == list(make_calculator.MODELS)
    assert len(make_calculator.MODELS) == 30


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in SAMPLE[:2] else pytest.mark.slow) for name in make_calculator.MODELS],
)
def test_a_models_parameters_are_those_of_today(name: str) -> None:
    pytest.importorskip("bitsandbytes")
    assert committed()["models"][name] == as_json(make_calculator.model_data(name)), "run `make figures`"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in SAMPLE[:2] else pytest.mark.slow)
        for table in draw_models.TABLES
        for name in draw_models.models_of(table)
    ],
)
def test_a_line_of_the_models_page_is_what_the_estimate_says_today(name: str) -> None:
    pytest.importorskip("bitsandbytes")
    drawn = {draw_models.row(name, method) for method in draw_models.METHODS}
    assert drawn <= set(draw_models.PAGE.read_text().splitlines()), "run `make figures`"


# --- every number is Python's -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def javascript(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[list[Choice]], list[Any]]]:
    """What calculator.js makes of choices, in node where it is there, or else in Chromium."""
    script = "choices.map(choice => calculator.estimate(data, choice))"
    if node := shutil.which("node"):
        program = (
            f"const data = require({str(ASSETS / 'calculator-data.js')!r});"
            f"const calculator = require({str(ASSETS / 'calculator.js')!r});"
            f"const choices = JSON.parse(require('fs').readFileSync(0)); console.log(JSON.stringify({script}));"
        )
        yield lambda choices: json.loads(
            subprocess.run(
                [node, "-e", program], input=json.dumps(choices), capture_output=True, text=True, check=True
            ).stdout
        )
        return
    with chromium.open_page(tmp_path_factory.mktemp("browser")) as page:
        text = (ASSETS / "calculator-data.js").read_text() + (ASSETS / "calculator.js").read_text()
        page.run(f"var module = {{}}; {text}; var calculator = module.exports, data = leanvocabData; 0")
        yield lambda choices: page.run(f"(choices => {script})({json.dumps(choices)})")


def drawn_choices(number: int, rows: int, outputs: Any, precisions: Any = make_calculator.PRECISIONS) -> list[Choice]:
    """Choices that differ in everything, always the same."""
    generator = random.Random(rows + number)
    choices = []
    for turn in range(number):
        output = outputs[turn % len(outputs)]
        tokens = generator.choice([None, 1, 37, 512, 4096, 32768, 100_000])
        choices.append(
            {
                "method": "all",
                "output": str(output),
                "kept": generator.choice([1, 2, min(rows, 5_000), rows - 1, rows, generator.randint(1, rows)]),
                "optimizer": OPTIMIZERS[turn % len(OPTIMIZERS)],
                "precision": generator.choice(precisions),
                "frozenRows": generator.choice(["device", "host"]),
                "tokens": None if output is None else tokens,
            }
        )
    return choices


def asked(choice: Choice) -> dict[str, Any]:
    """The arguments of `estimate_memory` for a choice."""
    return {
        "optimizer": choice["optimizer"],
        "output": None if choice["output"] == "None" else choice["output"],
        "frozen_rows": choice["frozenRows"],
        "num_tokens": choice["tokens"],
    }


def numbers_of(estimated: MemoryEstimate) -> dict[str, Any]:
    """Everything that the page shows of an estimate."""
    cards = {side: {str(card): fits[side] for card, fits in estimated.cards.items()} for side in ("full", "partial")}
    return {
        "full": estimated.full.to_dict(),
        "partial": estimated.partial.to_dict(),
        "saved_bytes": estimated.saved_bytes,
        "saved_ratio": estimated.saved_ratio,
        "vocabulary_ratio": estimated.vocabulary_ratio,
        "saves_little": estimated.saves_little,
        "cards": cards,
    }


def check(got: Any, estimated: MemoryEstimate, choice: Choice) -> None:
    expected = numbers_of(estimated)
    for side in ("full", "partial"):
        missing = {name: 0 for name in expected[side] if name not in got[side]}  # parts of which there is nothing
        got[side] = missing | got[side]
    assert got == expected, choice


def check_module(name: str, number: int, javascript: Any) -> None:
    config, arguments = make_calculator.estimate_arguments(name, "all", "fp32")
    module = lv_module(config, arguments["auto_class"])
    rows = module.get_input_embeddings().num_embeddings
    choices = [{"model": name, **its} for its in drawn_choices(number, rows, make_calculator.outputs_of(name))]
    for got, choice in zip(javascript(choices), choices, strict=True):
        check(got, lv.estimate_memory(module, choice["kept"], precision=choice["precision"], **asked(choice)), choice)


def lv_module(config: Any, auto_class: str) -> Any:
    import transformers

    with torch.device("meta"):
        module = getattr(transformers, auto_class).from_config(config)
    module.tie_weights()
    return module


@pytest.mark.parametrize("name", SAMPLE)
def test_every_number_of_a_model_is_that_of_the_estimate(name: str, javascript: Any) -> None:
    check_module(name, 36, javascript)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in make_calculator.MODELS if name not in SAMPLE])
def test_every_number_of_every_model_is_that_of_the_estimate(name: str, javascript: Any) -> None:
    check_module(name, 36, javascript)


@pytest.mark.parametrize(
    "name",
    [
        "HuggingFaceTB/SmolLM2-135M",
        *(pytest.param(name, marks=pytest.mark.slow) for name in (*SAMPLE, "openai/whisper-small")),
    ],
)
def test_every_number_of_qlora_is_that_of_the_command(name: str, javascript: Any) -> None:
    pytest.importorskip("bitsandbytes")
    rows = committed()["models"][name]["methods"]["all"]
    rows = next(iter(rows.values()))["tables"][0][0]
    outputs = make_calculator.outputs_of(name)
    choices = [
        {"model": name, **its, "method": "qlora"}
        for its in drawn_choices(6, rows, outputs, make_calculator.precisions_of("qlora"))
    ]
    for got, choice in zip(javascript(choices), choices, strict=True):
        config, arguments = make_calculator.estimate_arguments(name, "qlora", choice["precision"])
        check(got, lv.estimate_memory(config, choice["kept"], **arguments | asked(choice)), choice)


@pytest.mark.parametrize("kind", make_calculator.TYPED)
def test_every_number_of_typed_sizes_is_that_of_a_module_of_that_kind(kind: str, javascript: Any) -> None:
    generator = random.Random(kind)
    choices, modules = [], []
    for turn in range(16):
        width = generator.choice([1, 8, 63, 64, 320, 768])
        vocabulary = generator.choice([2, 1000, 30_522, 262_144])
        others = generator.choice([0, 5, width**2, 40 * width**2 + 4097, generator.randint(1, 60 * width**2)])
        sizes = {"vocabulary": vocabulary, "width": width, "others": others}
        with torch.device("meta"):
            modules += [make_calculator.TypedModel(*sizes.values(), kind)] * 6
        some = drawn_choices(6, vocabulary, make_calculator.TYPED[kind])
        choices += [
            {"kind": kind, **sizes, **its, "optimizer": OPTIMIZERS[(turn + at) % 6]} for at, its in enumerate(some)
        ]
    for got, choice, module in zip(javascript(choices), choices, modules, strict=True):
        check(got, lv.estimate_memory(module, choice["kept"], precision=choice["precision"], **asked(choice)), choice)


def test_tasks_rows_are_those_that_were_counted() -> None:
    tasks = committed()["tasks"]
    assert tasks["XLM-RoBERTa"]["SST-2"] == [9366, True]
    rows = committed()["models"]
    for name, entry in rows.items():
        (full, *_), *_ = next(iter(entry["methods"]["all"].values()))["tables"]
        assert all(0 < kept < full for kept, _ in tasks.get(entry["vocabulary"], {}).values()), name


# --- the page, in a browser -------------------------------------------------------------------------------------------


@pytest.fixture
def page(tmp_path: Path) -> Iterator[chromium.Page]:
    """The calculator's part of its page, as the site has it."""
    lines = (REPOSITORY / "docs" / "calculator.md").read_text().splitlines()
    body = "\n".join(line for line in lines if line.startswith("<"))
    shutil.copytree(ASSETS, tmp_path / "assets" / "calculator")
    named = {"viewport": "width=device-width", "color-scheme": "light dark"}
    head = "".join(f'<meta name="{name}" content="{content}">' for name, content in named.items())
    head += "<meta charset='utf-8'><title>Calculator</title>"
    text = f"<!doctype html><html lang='en'><head>{head}</head><body>{body}</body></html>"
    (tmp_path / "page.html").write_text(text)
    with chromium.open_page(tmp_path) as opened:
        opened.show(1200, 900)
        opened.load((tmp_path / "page.html").as_uri())
        yield opened
        assert opened.complaints == []


def status(page: chromium.Page) -> str:
    return str(page.run("document.querySelector('[role=status]').textContent"))


def focused(page: chromium.Page) -> str:
    return str(page.run("document.activeElement.name || ''"))


def tab_to(page: chromium.Page, name: str) -> None:
    for _ in range(20):
        if focused(page) == name:
            return
        page.press("Tab")
    raise AssertionError(f"Tab never came to {name}")


def sentence(full: int, partial: int) -> str:
    return f"Full {format_bytes(full)}, partial {format_bytes(partial)}: {format_ratio((full - partial) / full)} less."


def test_the_keyboard_alone_suffices(page: chromium.Page) -> None:
    tab_to(page, "model")
    page.write("google/gemma-3-2")
    assert page.run("document.activeElement.value") == "google/gemma-3-270m"
    tab_to(page, "kept")
    page.run("document.activeElement.select()")
    page.write("20000")
    tab_to(page, "optimizer")
    page.press("ArrowDown")
    tab_to(page, "output")
    tab_to(page, "tokens")
    page.write("4096")
    config, arguments = make_calculator.estimate_arguments("google/gemma-3-270m", "all", "fp32")
    expected = lv.estimate_memory(config, 20_000, optimizer="sgd", num_tokens=4096, **arguments)
    assert status(page) == sentence(expected.full.total_bytes, expected.partial.total_bytes)
    table = page.run("[...document.querySelectorAll('.lv-table')].map(one => one.innerText).join('\\n')")
    shown = re.findall(r"total\s+(\S+ \w+)\s+(\S+ \w+)", table)
    assert shown == [(format_bytes(expected.full.total_bytes), format_bytes(expected.partial.total_bytes))]


def test_a_task_of_the_paper_gives_its_rows(page: chromium.Page) -> None:
    tab_to(page, "task")
    page.write("SST")
    assert page.run("document.forms[0].elements.kept.value") == "9366"
    assert status(page) == "Full 4.45 GB, partial 1.49 GB: 66.4 % less."


def test_a_number_that_is_none_is_said_and_no_result_stays(page: chromium.Page) -> None:
    tab_to(page, "kept")
    page.run("document.activeElement.select()")
    page.write("300000")
    assert status(page) == "Rows kept: a whole number from 1 to 250,002."
    assert page.run("document.querySelector('.lv-result').textContent") == ""
    assert page.run("document.forms[0].elements.kept.getAttribute('aria-invalid')") == "true"


def test_no_request_leaves_the_page(page: chromium.Page) -> None:
    tab_to(page, "model")
    page.press("ArrowDown")
    asked_for = page.run("performance.getEntriesByType('resource').map(entry => entry.name)")
    addresses = [*page.addresses, *asked_for]
    assert {address.partition(":")[0] for address in addresses} == {"file"}
    own = "".join(path.read_text() for path in ASSETS.iterdir())
    assert not re.search(r"https?://|fetch\(|XMLHttpRequest|sendBeacon|import\(|@import|url\(", own)


def test_every_choice_has_a_label_and_results_are_announced(page: chromium.Page) -> None:
    unnamed = page.run("[...document.querySelectorAll('select, input')].filter(one => one.labels.length !== 1).length")
    assert unnamed == 0
    assert page.run("document.querySelector('.lv-status').getAttribute('aria-live')") == "polite"
    assert page.run("[...document.querySelectorAll('[role=img]')].map(bar => bar.getAttribute('aria-label'))") == [
        "full: 4.45 GB",
        "partial: 1.44 GB",
    ]
    headless = page.run("[...document.querySelectorAll('th')].filter(one => !one.scope).length")
    assert headless == 0


CONTRAST = """(() => {
  const rgb = text => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const linear = value => (value /= 255) <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const light = color => { const [r, g, b] = rgb(color).map(linear); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const canvas = matchMedia('(prefers-color-scheme: dark)').matches ? 'rgb(18, 18, 18)' : 'rgb(255, 255, 255)';
  const ground = one => {
    for (; one; one = one.parentElement) {
      const color = getComputedStyle(one).backgroundColor;
      if (!/, 0\\)$/.test(color)) return color;
    }
    return canvas;
  };
  const worst = [...document.querySelectorAll('label, p, select, input, th, td, caption, li, .lv-side, .lv-total')]
    .filter(one => one.offsetParent && (one.textContent.trim() || one.value))
    .map(one => {
      const [a, b] = [light(getComputedStyle(one).color), light(ground(one))].sort((x, y) => y - x);
      return [(a + 0.05) / (b + 0.05), one.outerHTML.slice(0, 80)];
    });
  return worst.sort((a, b) => a[0] - b[0])[0];
})()"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_words_stand_out_in_light_and_dark(page: chromium.Page, dark: bool) -> None:
    page.show(1200, 900, dark=dark)
    ratio, where = page.run(CONTRAST)
    assert ratio >= 4.5, where
    color = page.run("getComputedStyle(document.querySelector('.lv-calculator')).color")
    assert (color == "rgb(236, 236, 241)") == dark


def test_a_small_screen_has_all_of_it(page: chromium.Page) -> None:
    page.show(360, 740)
    for name in ("FacebookAI/xlm-roberta-base", "meta-llama/Llama-3.1-8B", "typed:untied"):
        page.run(f"document.forms[0].elements.model.value = {name!r}")
        page.run("document.forms[0].elements.model.dispatchEvent(new Event('input', {bubbles: true}))")
        assert page.run("document.documentElement.scrollWidth") <= 360, name
        cut = page.run(
            "[...document.querySelectorAll('.lv-table')].filter(one => one.scrollWidth > one.clientWidth).length"
        )
        assert cut == 0, name


def test_numbers_are_written_as_the_command_writes_them() -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node on this machine")
    numbers = [
        0,
        1,
        999,
        1000,
        99_949,
        99_951,
        999_499,
        999_501,
        *(random.Random(0).randint(0, 10**12) for _ in range(500)),
    ]
    program = f"const it = require({str(ASSETS / 'calculator.js')!r}); console.log(JSON.stringify({numbers}.map(it.formatBytes)))"
    run = subprocess.run([node, "-e", program], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == [format_bytes(number) for number in numbers]

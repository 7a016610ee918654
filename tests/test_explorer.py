"The page to look instead of read, in a real browser: it is clicked and dragged, and its numbers are Python's."
import base64
import io
import hashlib
import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, needs_cifar100
from PIL import Image
from synthetic import synthetic_record

from sortkd.train.augmentation import normalize
from sortkd.train.images import load_cifar100
from sortkd.evidence.preregistration import read_plan
from sortkd.experiment.storage import append_record
from sortkd.repairs import revise_logits
from sortkd.evidence.results import load_results, select
from sortkd.sorting import sort_logits, swap_logits
from sortkd.evidence.statistics import compare, t_half_width
from sortkd.train.teachers import load_teacher

EXPLORER, RESULTS = ROOT / "site" / "explorer", ROOT / "results"
PAGE = json.loads((EXPLORER / "examples.json").read_text())
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMEDRIVER = shutil.which("chromedriver")


def test_the_teacher_is_the_one_that_is_named():
    assert hashlib.sha256((ROOT / PAGE["teacher"]["file"]).read_bytes()).hexdigest() == PAGE["teacher"]["sha256"]


@pytest.mark.slow
@needs_cifar100
def test_images_and_logits_are_those_of_the_teacher():
    data, teacher = load_cifar100(), load_teacher(ROOT / PAGE["teacher"]["file"], "resnet20", 100)
    images, target = data.train_images, data.train_targets
    assert [name.replace("_", " ") for name in data.class_names] == PAGE["classes"]
    index = [each["index"] for each in PAGE["examples"]]
    assert target[index].tolist() == [each["target"] for each in PAGE["examples"]]
    shown = [np.array(Image.open(io.BytesIO(base64.b64decode(each["png"])))) for each in PAGE["examples"]]
    assert (np.stack(shown) == images[index].numpy()).all()
    logits = torch.tensor([each["logits"] for each in PAGE["examples"]])
    torch.testing.assert_close(teacher.model(normalize(images[index], data.mean, data.std)), logits, atol=0.01, rtol=0.001)  # float16 has 11 bits


@pytest.fixture
def browser():
    if not (CHROMIUM and CHROMEDRIVER):
        pytest.skip("chromium and chromedriver are not installed")
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,1000", "--force-prefers-reduced-motion"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))
    yield driver
    driver.quit()


def show(browser, page: Path, chosen: str = "") -> None:
    from selenium.webdriver.support.wait import WebDriverWait
    address = (page / "index.html").as_uri() + chosen
    browser.get(address)  # which on a busy machine can come back before the scripts have run
    whole = "return document.readyState === 'complete' && location.href === arguments[0]"
    WebDriverWait(browser, 30).until(lambda _: browser.execute_script(whole, address))


def rows(browser, table: str) -> list[list[str]]:
    script = "return [...document.querySelectorAll(arguments[0])].map(row => [...row.cells].map(cell => cell.textContent))"
    return browser.execute_script(script, f"#{table} tr")


def number(text: str) -> float:
    return float(text.replace("%", "").replace("−", "-").replace("\xa0", " ").strip())


def choose(browser, name: str, value: str) -> None:
    from selenium.webdriver.support.select import Select
    Select(browser.find_element("name", name)).select_by_value(value)


def checked(browser, name: str) -> list[str]:
    boxes = "[...document.getElementsByName(arguments[0])].filter(box => box.checked)"
    return browser.execute_script(f"return {boxes}.map(box => box.value)", name)


def check_distributions(browser, which: int) -> None:
    "What the page says of one image at the temperature of its slider, against Python, to the printed digit."
    browser.find_elements("css selector", ".thumb")[which].click()
    temperature = float(browser.find_element("id", "temperature-value").text)
    example = PAGE["examples"][which]
    logits, target = torch.tensor(example["logits"], dtype=torch.float64), torch.tensor(example["target"])
    repaired = torch.stack([logits, *(repair(logits, target) for repair in (swap_logits, revise_logits, sort_logits))])
    p = (repaired / temperature).softmax(1)
    shown = rows(browser, "bars")
    assert len(shown) == (10 if target in logits.topk(10).indices else 11)
    for name, *cells in shown:
        assert [number(cell) for cell in cells] == pytest.approx((100 * p[:, PAGE["classes"].index(name)]).tolist(), abs=0.0051)
    told = {name: [number(cell) for cell in cells] for name, *cells in rows(browser, "numbers")}
    assert told["target's rank"] == (1 + (repaired > repaired[:, target, None]).sum(1)).tolist()
    assert told["target's probability"] == pytest.approx((100 * p[:, target]).tolist(), abs=0.0051)
    assert told["entropy (nats)"] == pytest.approx(torch.special.entr(p).sum(1).tolist(), abs=0.00051)
    assert told["total variation from plain"] == pytest.approx(((p - p[0]).abs().sum(1) / 2).tolist(), abs=0.00051)


def planned_results(folder: Path) -> Path:
    "All planned seeds of sorting.yaml and all but one of weak_teacher.yaml, made up; the latter's look is not reached."
    shutil.copytree(RESULTS / "plans", folder / "plans")
    for name, seeds in (("sorting", 15), ("weak_teacher", 5)):
        plan = read_plan(RESULTS / "plans" / f"{name}.yaml")
        for cell in plan.grid.cells.query("seed < @seeds").itertuples():
            record = synthetic_record(cell.pair, cell.method, cell.seed, 60 + cell.seed % 2, epochs=60, teacher="resnet20", student="resnet8", synthetic=False)
            record["data"] |= {"name": "cifar100", "train_images": 50_000, "test_images": 10_000}
            record["about_teacher"] |= {"architecture": "resnet20", "file": Path(plan.grid.options["teacher"]).name,
                                        "weights_sha256": plan.teacher_sha256}
            append_record(folder / "paper.jsonl", record | {"preset": plan.grid.preset, "run_id": f"{name}-{record['run_id']}"})
    return folder


def check_curves(browser, runs, methods: list[str]) -> None:
    "The means and bands that are drawn, against Python; which methods, and that no two look the same."
    lines, bands, names = browser.execute_script(
        "const data = document.getElementById('curves').data, of = (mode, key) => data.filter(each => each.mode === mode).map(each => each[key]);"
        "return [of('lines', 'y'), of('none', 'y'), of('lines', 'line').map(JSON.stringify)]")
    assert checked(browser, "method") == methods and len({*names}) == len(methods)
    for method, mean, band in zip(methods, lines, bands, strict=True):
        curves = np.array([curve["test_top1"] for curve in runs.loc[runs["method"] == method, "curve"]])
        high = curves.mean(0) + t_half_width(curves.std(0, ddof=1), len(curves))
        assert mean == pytest.approx(curves.mean(0)) and band[:len(mean)] == pytest.approx(high)


def test_the_page_says_what_python_says(browser, tmp_path):
    from selenium.webdriver import Keys
    build = runpy.run_path(str(EXPLORER / "build.py"))["build"]
    build(tmp_path / "page")
    show(browser, tmp_path / "page")
    for which in (0, 20):  # second; deep down
        check_distributions(browser, which)
    slider = browser.find_element("id", "temperature")
    slider.send_keys(Keys.HOME)
    assert browser.find_element("id", "temperature-value").text == "1.0"
    for which in (9, 23):  # fourth; right
        check_distributions(browser, which)
    assert "The teacher is right" in browser.find_element("id", "story").text
    slider.send_keys(Keys.END)
    check_distributions(browser, 14)

    runs, _ = load_results(RESULTS)
    choose(browser, "teacher", "resnet56-cifar100-10epochs → resnet20")
    short = runs[runs["pair"] == "r56_r20"]
    check_curves(browser, short, ["kd", "kd+sort"])
    browser.find_element("css selector", "[name=method][value='dkd+sort']").click()
    check_curves(browser, short, ["dkd+sort", "kd", "kd+sort"])
    browser.find_element("name", "runs").click()
    shown = short[short["method"].isin(["dkd+sort", "kd", "kd+sort"])]
    assert sorted(number(row[2]) for row in rows(browser, "runs")[1:]) == pytest.approx(sorted(shown["last_top1"]), abs=0.0051)
    drawn = "return document.getElementById('curves').data.filter(each => each.mode === 'lines').length"
    assert browser.execute_script(drawn) == len(shown) + 3
    effect = compare(select(runs, preset="short", pair="r56_r20", method=["kd", "kd+sort"]), "kd+sort", "kd").iloc[0]
    told = (f"{effect['mean']:+.2f} points (n = {effect.seeds}, 95 % interval {effect.low:+.2f} to {effect.high:+.2f}), {effect.verdict}. not planned")
    for first, second in (("kd+sort", "kd"), ("kd", "kd+sort")):
        choose(browser, "first", first), choose(browser, "second", second)
        assert browser.find_element("id", "verdicts").text == f"KD + sort minus KD: {told.replace('-', '−')}"
    choose(browser, "first", "kd+sort")
    assert browser.find_element("id", "verdicts").text == "Choose two different methods."
    address = browser.current_url
    settings = [checked(browser, name) for name in ("image", "method", "runs")]
    show(browser, tmp_path / "page", "?" + address.partition("?")[2])
    assert [checked(browser, name) for name in ("image", "method", "runs")] == settings
    show(browser, tmp_path / "page", "?teacher=none&data=x&method=x&image=99&temperature=x&first=ce")
    first = runs[(runs["epochs"] == 60) & runs["teacher_file"].isin(["", "resnet20-cifar100.safetensors"])]
    check_curves(browser, first, ["ce", "kd", "kd+sort"])

    build(tmp_path / "planned", planned_results(tmp_path / "results"))
    show(browser, tmp_path / "planned")
    assert "n = 15 of 15" in (text := browser.find_element("id", "verdicts").text) and text.endswith("equivalent. planned: sorting")
    assert len(browser.find_elements("css selector", "[name=teacher] option")) == 1  # nothing of weak_teacher
    assert "weak_teacher" in browser.find_element("id", "waiting").text

    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert asked and all(url.startswith(("file:", "data:")) for url in asked)

"""MLflow's own UI in a real browser: what someone sees who compares the cells of a sweep."""

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import urllib.request

import pytest
from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait
from slurm import free_ports

SHORT = ("trainer.max_steps=3", "trainer.per_device_train_batch_size=4", "eval.num_puzzles=10")
OPTIONS = [
    "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1600,1300", "--no-first-run",
    # Nothing but this machine: neither for Chromium itself nor for the page.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--no-proxy-server",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-default-apps",
]  # fmt: skip
# The values of the only chart, by run.
PLOTTED = """
const charts = [...document.querySelectorAll(".js-plotly-plot")];
return charts.length == 1 && Object.fromEntries(charts[0].data.map(({uuid, y}) => [uuid, Array.from(y)]));
"""


def wait(look, seconds: float = 60):
    """What ``look()`` returns, once it is true and raises no error of the browser's or the network's."""
    return WebDriverWait(None, seconds, ignored_exceptions=(WebDriverException, OSError)).until(lambda _: look())


class Browser(webdriver.Chrome):
    """Chromium, with the few things that a person does to a page."""

    def see(self, css: str) -> list:
        return wait(lambda: [each for each in self.find_elements(By.CSS_SELECTOR, css) if each.is_displayed()])

    def press(self, css: str) -> None:
        wait(lambda: self.find_element(By.CSS_SELECTOR, css).click() or True)

    def write(self, css: str, text: str) -> None:
        wait(lambda: self.find_element(By.CSS_SELECTOR, css).send_keys(text) or True)

    def table(self, heading: str) -> dict[str, list[str]]:
        """The rows of the table in a section of the page, by what stands first in each."""
        rows = f"//*[@role='button'][normalize-space()='{heading}']/following::table[1]//tr"
        cells = [row.find_elements(By.XPATH, "./th|./td") for row in self.find_elements(By.XPATH, rows)]
        return {name.text: [value.text for value in values] for name, *values in cells if name.is_displayed()}


@pytest.fixture(scope="module")
def browser():
    if missing := [program for program in ("chromium", "chromedriver") if not shutil.which(program)]:
        message = f"no browser: no {', '.join(missing)}; apt-get install chromium chromium-driver"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for option in OPTIONS:
        options.add_argument(option)
    with pytest.MonkeyPatch.context() as patch:
        # Selenium would look for a browser to download, and tell its makers.
        patch.setenv("SE_OFFLINE", "true")
        patch.setenv("SE_AVOID_STATS", "true")
        with Browser(options, webdriver.ChromeService(shutil.which("chromedriver"))) as browser:
            yield browser


@pytest.fixture(scope="module")
def runs_page(browser, launch_once):
    """The address of the runs in MLflow's UI, which remembers that the sweep's cells are to be shown."""
    result = launch_once("-m", "precision=bf16,fp32", "gen=hf", *SHORT)
    assert result.returncode == 0, result.stderr
    port = free_ports()["port0"]
    address = f"http://127.0.0.1:{port}"
    log = launch_once.folder / "server.log"
    with log.open("w") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
             "--backend-store-uri", launch_once.uri],
            # Of the server's processes only those that answer; none of them tells MLflow's makers.
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
            cwd=launch_once.folder, stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip
    try:
        wait(lambda: server.poll() is not None or urllib.request.urlopen(f"{address}/health").status == 200, 120)
        assert server.poll() is None, log.read_text()
        (sweep,) = launch_once.runs("sweep")
        page = f"{address}/#/experiments/{sweep.info.experiment_id}/runs"
        browser.get(page)
        browser.press("[data-component-id='mlflow.assistant.chat_panel.close']")
        browser.press(f"[row-id='{sweep.info.run_id}'] [data-component-id*='runnamecellrenderer']")  # shows its cells
        yield page
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)  # its children too
        server.wait(30)


def test_compare_shows_each_param_that_differs_and_no_other(browser, runs_page, launch_once, tmp_path):
    cells = {cell.info.run_id: cell.data.params["precision"] for cell in launch_once.runs("cell")}
    assert set(cells.values()) == {"bf16", "fp32"}
    browser.get(runs_page)
    for run_id in cells:
        browser.press(f"[row-id='{run_id}'] .ag-selection-checkbox")
    browser.save_screenshot(tmp_path / "runs.png")
    browser.press("[data-testid='runs-compare-button']")
    wait(lambda: browser.table("Parameters").get("seed") == ["42", "42"])
    browser.press("[aria-label='Parameters - Show diff only']")
    wait(lambda: "seed" not in browser.table("Parameters"))
    columns = browser.table("Run details")["Run ID:"]
    assert browser.table("Parameters") == {"precision": [cells[run_id] for run_id in columns]}
    browser.save_screenshot(tmp_path / "compare.png")


def test_the_loss_curves_of_the_cells_are_drawn_side_by_side(browser, runs_page, launch_once, tmp_path):
    losses = {cell.info.run_id: launch_once.losses(cell.info.run_id) for cell in launch_once.runs("cell")}
    browser.get(runs_page)
    browser.press("label:has([name='runs-view-mode'][value='CHART'])")
    browser.write("[placeholder='Search metric charts']", "train/loss")
    wait(lambda: browser.execute_script(PLOTTED) == losses)

    def colours():
        return {line.value_of_css_property("stroke") for line in browser.see(".js-line")}

    lines = wait(lambda: len(found := colours()) == 2 and found)  # the curves come one after the other
    browser.save_screenshot(tmp_path / "charts.png")
    picture = wait(lambda: browser.see(".js-plotly-plot")[0].screenshot_as_png)
    chart = Image.open(io.BytesIO(picture)).convert("RGB")
    # Where the curves lie on each other, only the upper one is seen.
    assert lines & {f"rgb{colour}" for _, colour in chart.getcolors(chart.width * chart.height)}

"""Log in to Airflow as a person does, save pictures of its UI, and click the links to queries."""

import argparse
import io
from pathlib import Path

from PIL import Image
from playwright.sync_api import FloatRect, Locator, Page, expect, sync_playwright

DAG = "complete_pipeline"
CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
TIMEOUT = 30_000
"""Milliseconds until what is to be seen is there."""
MAX_BYTES = 60_000
WIDTH = 520
"""Of the pages: a phone shows them at three quarters of their size, and so their letters."""
MARGIN = 8
HIDDEN = "[role=tooltip], .react-flow__panel { display: none !important }"
"""What lies on top of the parts that a picture shows."""


def save(page: Page, parts: Locator, path: Path) -> None:
    """Save a picture that shows all of these parts of the page, and a margin."""
    # All at once, as a page may replace its parts while it is looked at.
    left, top, right, bottom = parts.evaluate_all(
        """parts => {
            const boxes = parts.map((part) => part.getBoundingClientRect());
            const far = (pick, side) => pick(...boxes.map((box) => box[side]));
            return [
                far(Math.min, "left"),
                far(Math.min, "top"),
                far(Math.max, "right"),
                far(Math.max, "bottom"),
            ];
        }"""
    )
    left, top = max(left - MARGIN, 0), max(top - MARGIN, 0)
    right, bottom = right + MARGIN, bottom + MARGIN
    clip = FloatRect(x=left, y=top, width=right - left, height=bottom - top)
    picture = page.screenshot(animations="disabled", full_page=True, clip=clip)
    image = Image.open(io.BytesIO(picture))
    image.convert("RGB").quantize(64, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        path, optimize=True
    )
    size = path.stat().st_size
    print(f"{path}: {size} bytes")
    assert size < MAX_BYTES, f"{path} has {size} bytes"


def open_queries(page: Page, airflow: str, dag_id: str, task: str) -> None:
    """Click the query's address in the task's log, and the link under the task's details."""
    page.goto(f"{airflow}/dags/{dag_id}/runs")
    run = page.locator(f"a[href*='/dags/{dag_id}/runs/']").first.get_attribute("href")
    for tab, link in (
        ("", page.locator("a[href*='/queries/']").first),
        ("/details", page.get_by_role("link", name="Polars Cloud query")),
    ):
        page.goto(f"{airflow}{str(run).rstrip('/')}/tasks/{task}{tab}")
        with page.expect_popup() as opened:
            link.click()
        query = opened.value
        expect(query.get_by_role("heading", name=task.replace("/mapped/", "["))).to_be_visible()
        expect(query.get_by_role("heading", name="Plan", exact=True)).to_be_visible()
        expect(query.get_by_role("table").get_by_role("row")).not_to_have_count(0)
        query.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("user")
    parser.add_argument("password")
    parser.add_argument("emulator")
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page(
            viewport={"width": 1200, "height": 1200}, color_scheme="light", locale="en-GB"
        )
        page.set_default_timeout(TIMEOUT)
        expect.set_options(timeout=TIMEOUT)

        page.goto(f"{arguments.url}/dags")
        page.locator("input[name=username]").fill(arguments.user)
        page.locator("input[name=password]").fill(arguments.password)
        page.get_by_role("button", name="Sign in").click()
        page.get_by_role("button", name="Show table view").click()
        latest_run = f"a[href*='/dags/{DAG}/runs/']"
        expect(page.get_by_role("table").locator(latest_run)).to_be_visible()
        page.get_by_role("button", name="Filter table columns").click()
        for column in ("Schedule", "Next Run", "Tags"):
            page.get_by_role("menu").get_by_text(column).click()
        page.keyboard.press("Escape")
        expect(page.get_by_role("columnheader", name="Tags")).to_have_count(0)
        page.add_style_tag(content=HIDDEN)
        page.set_viewport_size({"width": 720, "height": 1200})
        # Without the buttons of each row, at its end.
        cells = page.get_by_role("table").locator("tr > :nth-child(-n + 3)")
        save(page, cells, arguments.folder / "dags.png")
        page.set_viewport_size({"width": 1200, "height": 1200})

        # From top to bottom, the graph is narrow enough for a phone.
        page.evaluate(f"localStorage.setItem('direction-{DAG}', '\"DOWN\"')")
        page.get_by_role("link", name=DAG).click()
        # With a run selected, the graph shows how each of its tasks ended.
        page.locator(latest_run).first.click()
        expect(page.get_by_role("heading", name="Duration")).to_be_visible()
        page.get_by_role("button", name="Collapse Details Panel").click()
        page.get_by_role("button", name="Show Graph").click()
        tasks = page.locator(".react-flow__node")
        expect(tasks.filter(has_text="success")).to_have_count(6)
        # Waits for the graph to stand still.
        tasks.last.click(trial=True)
        page.add_style_tag(content=HIDDEN)
        graph = page.locator(".react-flow__node, .react-flow__edge")
        save(page, graph, arguments.folder / f"{DAG}.png")

        for dag_id, task in (
            (DAG, "build_report"),
            ("parallel_single_node", "rank_products/mapped/0"),
            ("status_check", "count_order_statuses"),
            ("single_query", "submit_best_sellers"),
        ):
            open_queries(page, arguments.url, dag_id, task)

        page.goto(arguments.emulator)
        for width in (390, 1200, WIDTH):
            page.set_viewport_size({"width": width, "height": 1150})
            expect(page.get_by_role("heading", name="airflow-complete-pipeline")).to_be_visible()
            assert page.evaluate("document.documentElement.scrollWidth") == width
        shown = page.locator("main > p, .legend, .clusters")
        save(page, shown, arguments.folder / "clusters.png")
        without_scripts = browser.new_page(java_script_enabled=False)
        without_scripts.goto(arguments.emulator)
        expect(without_scripts.get_by_text("Billed:")).to_be_visible()
        browser.close()


if __name__ == "__main__":
    main()

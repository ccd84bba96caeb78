"""The HTML report in a browser: nothing is fetched, nothing sticks out, pointer and keys read every band."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import pytest
from browser import Opened
from test_report import CARD, GIB, NASTY, SNAPSHOT, made_books, step_line, write

from trl_memtrace.comparison import Tolerance, compare, read_side
from trl_memtrace.reading import read
from trl_memtrace.reporters.comparison_html import write_comparison
from trl_memtrace.reporters.html import write_report
from trl_memtrace.step_books import StepBooks, peak_books_path


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser.chromium() as running:
        yield running


def recorded(folder: Path, source: str = "run", steps: int = 6) -> Path:
    """A record of a run with the books of its peak step, and its report."""
    kept = made_books(4000)
    books = StepBooks(3, kept.books, kept.allocator, kept.timeline)
    at = books.books.peak(books.books.spans)
    held = {category.value: size for category, size in books.books.categories_at(at).items()}
    modules = {
        name: {kind.value: size for kind, size in row.items()} for name, row in books.books.modules_at(at).items()
    }
    rows = [
        step_line(
            number,
            {name: size if number == 3 else size // 2 for name, size in held.items()},
            traced=number != 2,
            reserved=GIB,
            roles=books.books.roles_at(at) if number == 3 else {},
            modules=modules if number == 3 else {},
        )
        for number in range(1, steps + 1)
    ]
    model = {"class": "Phi3ForCausalLM", "parameters": 10, "trainable_parameters": 5, "bytes": 40}
    components = {"attention": {"parameters": 4, "bytes": 16}, "mlp": {"parameters": 6, "bytes": 24}}
    layers = [{"count": 2, "parameters_each": 4, "bytes_each": 16}]
    described = {**model, "components": components, "layers": layers, "layer_parameters": 8, "non_layer_parameters": 2}
    file = write(folder, rows, source=source, device=CARD, model=described, args={"per_device_train_batch_size": 8})
    books.save(peak_books_path(file))
    return write_report(read(folder), folder / "report.html")


@pytest.fixture(scope="module")
def report(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return Opened(chromium, recorded(tmp_path_factory.mktemp("run"))).drawn()


def snapshot_report(folder: Path) -> Path:
    if not SNAPSHOT.is_file():
        pytest.skip("the real snapshots are not here")
    return write_report(read(SNAPSHOT), folder / "snapshot.html")


def comparison_page(folder: Path) -> Path:
    """Two runs side by side, the second with a longer name and larger modules."""
    one, two = folder / "a", folder / ("b" * 120)
    recorded(one)
    held = {"weights": GIB, "activations": 3 * GIB}
    write(two, [step_line(1, held, modules={f"model.layers.{place}.{'x' * 90}": held for place in range(70)})])
    sides = (read_side(one), read_side(two))
    return write_comparison(compare(*sides), folder / "diff.html", Tolerance.parse("2%"))


@pytest.mark.parametrize(
    "make",
    [recorded, lambda folder: recorded(folder, "dry_run"), snapshot_report, comparison_page],
    ids=["run", "dry run", "snapshot", "diff"],
)
def test_a_page_opens_alone_and_fits(chromium: Any, tmp_path: Path, make: Any) -> None:
    opened = Opened(chromium, make(tmp_path))
    if opened.page.locator("[data-figure]").count():  # a comparison has none, and no script to draw it
        opened.drawn()
    for width in (1440, 380):
        opened.resized(width)
        for scheme in ("light", "dark"):
            opened.page.emulate_media(color_scheme=scheme)
            assert opened.sticking_out() == []
            wanted = browser.screenshots_wanted()
            if wanted is not None:
                opened.page.screenshot(path=wanted / f"{opened.page.title()}-{width}-{scheme}.png", full_page=True)
    for summary in opened.page.locator("summary").all():
        if summary.is_visible():
            summary.click()
    assert opened.sticking_out() == []
    assert opened.said == []
    assert opened.fetched == []
    opened.page.close()


def test_the_check_sees_what_sticks_out_and_what_is_fetched(chromium: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text(
        '<div style="width:2000px">a</div><img src="missing.png"><script>throw Error("no")</script>'
    )
    opened = Opened(chromium, tmp_path / "bad.html")
    assert opened.sticking_out()
    assert any("no" in said for said in opened.said)
    assert [url.rpartition("/")[2] for url in opened.fetched] == ["missing.png"]
    opened.page.close()


_THICKEST = """plot => {
  const area = plot._fullLayout, frame = plot.getBoundingClientRect();
  const bands = plot.data.filter(trace => trace.stackgroup);
  return bands.map((band, number) => {
    const at = band.y.indexOf(Math.max(...band.y));
    const below = bands.slice(0, number).reduce((sum, other) => sum + other.y[at], 0);
    return {name: band.meta.name, value: band.y[at], total: bands.reduce((sum, other) => sum + other.y[at], 0),
            x: frame.left + area._size.l + area.xaxis.d2p(band.x[at]),
            y: frame.top + area._size.t + area.yaxis.d2p(below + band.y[at] / 2)};
  });
}"""


@pytest.mark.parametrize("section", ["steps", "timeline"])
def test_every_band_is_read_under_the_pointer(report: Opened, section: str) -> None:
    report.resized(1440)
    figure = report.page.locator(f"#{section} figure")
    figure.scroll_into_view_if_needed()
    home = figure.locator(".when").inner_text()
    bands = figure.locator(".plot").evaluate(_THICKEST)
    assert len(bands) >= 4
    for band in bands:
        report.page.mouse.move(band["x"], band["y"])
        assert figure.locator(".tip").inner_text() == f"{band['name']} {band['value']:.2f} MiB"
        row = figure.locator("tr.under")
        assert row.locator("th").inner_text() == band["name"]
        assert row.locator(".value").inner_text() == f"{band['value']:.2f}"
        assert figure.locator("[data-total]").inner_text() == f"{band['total']:.2f}"
    report.page.mouse.move(2, 2)
    assert figure.locator(".when").inner_text() == home
    assert not figure.locator(".tip").is_visible()


def test_keys_move_along_and_from_band_to_band(report: Opened) -> None:
    report.resized(1440)
    figure = report.page.locator("#steps figure")
    figure.locator(".plot").focus()
    press, when = report.page.keyboard.press, figure.locator(".when")
    assert when.inner_text() == "Step 3, the peak"
    press("Home")
    assert when.inner_text() == "Step 1, backward"
    press("ArrowRight")
    press("ArrowRight")
    assert when.inner_text() == "Step 4, backward"  # step 2 was not traced
    press("End")
    press("ArrowLeft")
    assert when.inner_text() == "Step 5, backward"
    press("ArrowUp")
    first = figure.locator(".said").inner_text()
    press("ArrowUp")
    assert first.startswith("Step 5, backward: weights ")
    assert figure.locator(".said").inner_text().startswith("Step 5, backward: activations ")
    press("p")
    assert when.inner_text() == "Step 3, backward"
    press("Escape")
    assert when.inner_text() == "Step 3, the peak"


def test_everything_is_reached_by_tab_and_opened_by_enter(report: Opened) -> None:
    report.resized(1440)
    page = report.page
    page.locator("a.skip").focus()
    reached = [page.evaluate("document.querySelector('a, button, summary, [tabindex]').className")]
    for _ in range(60):
        page.keyboard.press("Tab")
        tag = page.evaluate("document.activeElement.className || document.activeElement.tagName")
        if tag == "BODY":
            break
        reached.append(tag)
    assert reached[0] == "skip"
    assert len([name for name in reached if name.startswith("plot")]) == page.locator(".plot").count() == 3
    assert reached.count("SUMMARY") >= 2
    branch = page.locator("#peak details > summary").first
    branch.focus()
    page.keyboard.press("Enter")
    assert page.locator("#peak details.branch > summary").first.is_visible()


def test_the_page_prints_within_the_paper(report: Opened) -> None:
    report.resized(1440)
    report.page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    report.page.wait_for_function("[...document.querySelectorAll('.plot .main-svg')].every(s => s.clientWidth <= 660)")
    report.page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    report.resized(1440)
    assert report.page.pdf(format="A4").startswith(b"%PDF")
    assert report.said == []


def test_nothing_from_outside_runs(chromium: Any, tmp_path: Path) -> None:
    held = {"weights": GIB, "activations": 2 * GIB}
    steps = [step_line(n, held, modules={NASTY: held, "model.layers.0": {}}) for n in (1, 2)]
    write(tmp_path, steps, device={"name": NASTY}, args={NASTY: NASTY}, model={"class": NASTY, "parameters": 1})
    opened = Opened(chromium, write_report(read(tmp_path), tmp_path / "report.html")).drawn()
    assert opened.said == []
    assert opened.page.locator("img").count() == 0
    assert opened.page.locator("#peak .plot svg").get_by_text("<script>alert(1)</script>").count() > 0
    opened.page.close()


def test_a_script_that_got_in_would_not_run(chromium: Any, tmp_path: Path) -> None:
    file = recorded(tmp_path)
    source = file.read_text(encoding="utf-8")
    file.write_text(source.replace("<main", '<script>alert(2)</script><img src="x" onerror="alert(3)"><main'))
    opened = Opened(chromium, file).drawn()
    assert not [said for said in opened.said if said.startswith("dialog")]
    assert len([said for said in opened.said if "Content Security Policy" in said]) >= 2
    opened.page.close()


@pytest.mark.slow
def test_ten_thousand_steps_are_small_and_open_at_once(chromium: Any, tmp_path: Path) -> None:
    rows = [
        step_line(n, {"weights": 6 * GIB, "activations": GIB + n * 7919 % 10_007 * 2**18}, reserved=12 * GIB)
        for n in range(1, 10_001)
    ]
    rows[6_666] = step_line(6_667, {"weights": 6 * GIB, "activations": 50 * GIB}, reserved=60 * GIB)
    write(tmp_path, rows, device=CARD)
    file = write_report(read(tmp_path), tmp_path / "report.html")
    assert file.stat().st_size < 12_000_000
    began = time.perf_counter()
    opened = Opened(chromium, file)
    assert time.perf_counter() - began < 2
    opened.drawn()
    bands = json.loads(opened.page.locator("#steps figure > script").text_content())["data"][:2]
    assert max(bands[1]["y"]) == 50.0
    assert bands[1]["x"][bands[1]["y"].index(50.0)] == 6_667
    opened.page.close()

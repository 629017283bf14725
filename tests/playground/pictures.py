"""Takes the pictures of the page in docs/ anew: `python -m tests.playground.pictures`.

The demo models make the clips. What comes out is looked at by a person before it is committed.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from tests.support.browsers import chromium, service

DOCS = Path(__file__).resolve().parents[2] / "docs"
DESKTOP, PHONE = (1440, 900), (390, 844)
GAP, BETWEEN = 16, (60, 55, 50)
PATIENCE_MS = 600_000
HALF = 50  # per cent, at which a clip that is made has a picture worth seeing

SET_FRAMES = """frames => { const slider = document.getElementById("frames");
slider.value = frames; slider.dispatchEvent(new Event("input", { bubbles: true })); }"""
STOP_AT = """seconds => { const clip = document.querySelectorAll(".player video")[1];
clip.pause(); clip.currentTime = seconds; }"""
TO_STAGE = "document.getElementById('stage').scrollIntoView()"
TO_TOP = "window.scrollTo(0, 0)"


def main() -> None:
    with TemporaryDirectory() as state, chromium() as browser, service(Path(state)) as served:
        with visit(browser, served.address, DESKTOP, "light") as page:
            choose(page, 0, 49)
            keep("playground-plan", page.screenshot())
            begin(page)
            page.evaluate(TO_TOP)
            keep("playground-running", page.screenshot())
            finish(page, 0.62)
            page.evaluate(TO_TOP)
            keep("playground", page.screenshot())
        with visit(browser, served.address, PHONE, "dark") as page:
            shots = [page.screenshot()]
            choose(page, 1, 25)
            shots.append(seen(page))
            begin(page)
            shots.append(seen(page))
            finish(page, 0.8)
            shots.append(seen(page))
        keep("playground-phone", side_by_side(shots))


@contextmanager
def visit(browser, address, size, scheme) -> Iterator[object]:
    is_phone = size == PHONE
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]},
        color_scheme=scheme,
        is_mobile=is_phone,
        has_touch=is_phone,
    )
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.goto(address)
    page.wait_for_selector(".example:not([disabled])")
    page.wait_for_timeout(8000)  # the dancer has danced
    yield page
    context.close()


def choose(page, example, frames):
    page.locator(".example").nth(example).click()
    page.wait_for_selector("#frames:not([disabled])")
    page.evaluate(SET_FRAMES, frames)
    page.wait_for_selector(".stills img")
    page.wait_for_timeout(1500)


def begin(page):
    page.click("#make")
    page.mouse.move(5, 5)
    page.wait_for_selector(".live img:not(.veiled)")
    while int(page.get_attribute(".stage .progress", "aria-valuenow")) < HALF:
        page.wait_for_timeout(100)


def finish(page, moment_s):
    page.wait_for_selector("#view-finished:not([hidden])")
    page.evaluate(STOP_AT, moment_s)
    page.wait_for_timeout(1500)


def seen(page):
    page.evaluate(TO_STAGE)
    page.wait_for_timeout(300)
    return page.screenshot()


def side_by_side(shots):
    pictures = [Image.open(io.BytesIO(shot)).convert("RGB") for shot in shots]
    width, height = PHONE
    row = Image.new("RGB", (len(shots) * (width + GAP) - GAP, height), BETWEEN)
    for place, picture in enumerate(pictures):
        row.paste(picture, (place * (width + GAP), 0))
    file = io.BytesIO()
    row.save(file, "PNG")
    return file.getvalue()


def keep(name, shot):
    picture = Image.open(io.BytesIO(shot)).convert("RGB")
    picture.save(DOCS / f"{name}.png", optimize=True)
    print(DOCS / f"{name}.png")


if __name__ == "__main__":
    main()

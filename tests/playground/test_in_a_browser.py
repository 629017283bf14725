"""The page as a person drives it: Chromium opens it, the demo models make the clips."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.media.video import probe_video, read_video
from tests.support.browsers import axe, chromium, service

pytestmark = pytest.mark.slow

HOME = Path(__file__).resolve().parents[2] / "engine" / "demo"
DESKTOP, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}
START_MS, CLIP_MS = 60_000, 240_000
SHORT = 9  # frames: a clip of seconds
LEVELS = 4  # of 255 by which two decoders of a frame may differ on average


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def served(browser, tmp_path_factory):
    with service(tmp_path_factory.mktemp("served")) as running:
        yield running


@pytest.fixture
def opened(browser, served):
    """Opens pages of one visitor, and holds them to saying nothing in the console."""
    contexts, said = [], []

    def open_page(context=None, **options):
        if context is None:
            context = browser.new_context(**({"viewport": DESKTOP} | options))
            contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(START_MS)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("console", lambda one: one.type == "error" and said.append(one.text))
        page.goto(served.address)
        page.wait_for_selector(".example:not([disabled])")
        return page

    yield open_page
    for context in contexts:  # no job of a test that failed holds up the next one
        for page in context.pages[:1]:
            for job in jobs(page):
                page.request.post(f"{served.address}cancel/{job['id']}", data={})
        context.close()
    refused = "the server responded with a status of 40"  # the page tells it; the browser does too
    assert [one for one in said if refused not in one] == []


def take_example(page, place=0, frames=SHORT):
    page.locator(".example").nth(place).click()
    page.wait_for_selector("#frames:not([disabled])")
    choose_frames(page, frames)


def choose_frames(page, frames):
    page.evaluate(
        """frames => { const slider = document.getElementById("frames");
        slider.value = frames; slider.dispatchEvent(new Event("input", { bubbles: true })); }""",
        frames,
    )
    until(
        page,
        f"document.getElementById('make-why').textContent.startsWith('{frames} frames,')",
    )


def make(page):
    page.click("#make")
    page.wait_for_selector("#view-running:not([hidden])")


def wait_for_clip(page):
    page.wait_for_selector(
        "#view-finished:not([hidden]), #view-failed:not([hidden])", timeout=CLIP_MS
    )
    assert page.locator("#view-failed").is_hidden(), page.inner_text("#view-failed")
    until(page, "document.querySelectorAll('.player video')[1].readyState >= 2")


def until(page, claim):
    """Waits for a claim in JavaScript. Playwright's own way needs `eval`, which is forbidden."""
    ends = time.monotonic() + START_MS / 1000
    while not page.evaluate(claim):
        assert time.monotonic() < ends, f"it never came true that {claim}"
        page.wait_for_timeout(50)


def told(page, name):
    """Returns a figure of the facts that are in view."""
    return page.locator(f".view:not([hidden]) .facts dt:text-is('{name}') + dd").inner_text()


def jobs(page):
    return page.evaluate(
        """async () => (await (await fetch("/jobs",
        { headers: { "X-Browser": localStorage.getItem("scail-browser") } })).json()).jobs"""
    )


def test_an_example_becomes_a_clip_whose_frames_are_those_of_the_file(opened, served):
    """Plan, progress, clip beside the dance, and download, in one visit."""
    page = opened()
    assert page.inner_text("h2.lead") == "A picture. A dance. One clip."
    assert page.locator("#make").is_disabled()
    take_example(page)
    assert told(page, "Clip").startswith("96 \u00d7 160")
    assert f"{SHORT} frames" in told(page, "Clip")
    page.fill("#seed", "11")
    page.dispatch_event("#seed", "change")

    make(page)
    page.wait_for_selector(".steps [aria-current=step]")
    until(page, "Number(document.querySelector('.progress').getAttribute('aria-valuenow')) > 0")
    job = next(one for one in jobs(page) if one.get("action") == "generate")
    wait_for_clip(page)
    assert told(page, "Seed").startswith("11")
    assert page.locator(".player video").count() == 2

    with page.expect_download() as arrives:
        page.click("text=Download")
    path = served.state / "clip.mp4"
    arrives.value.save_as(path)
    frames = frames_of(path)
    assert frames.shape == (SHORT, 160, 96, 3)
    page.evaluate("document.querySelectorAll('.player video')[1].pause()")
    for place in (0, SHORT - 1):
        shown = frame_shown(page, (place + 0.5) / 24)
        apart = [np.abs(shown.astype(int) - frame.astype(int)).mean() for frame in frames]
        assert apart[place] < LEVELS
        assert apart[place] == min(apart)
    assert job["input"]["seed"] == 11


def frames_of(clip):
    """Decodes a clip as [T, H, W, 3] u8."""
    return torch.cat([*read_video(probe_video(clip))]).numpy()


def frame_shown(page, moment_s):
    """Returns the picture [H, W, 3] u8 that the clip's player shows at a moment."""
    pixels = page.evaluate(
        """async (moment) => {
        const video = document.querySelectorAll(".player video")[1];
        await new Promise(done => {
          video.addEventListener("seeked", done, { once: true }); video.currentTime = moment; });
        await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
        const canvas = document.createElement("canvas");
        canvas.width = video.videoWidth; canvas.height = video.videoHeight;
        const pen = canvas.getContext("2d"); pen.drawImage(video, 0, 0);
        return [canvas.height, canvas.width, [...pen.getImageData(0, 0, canvas.width, canvas.height).data]];
        }""",  # noqa: E501
        moment_s,
    )
    height, width, flat = pixels
    return np.array(flat, np.uint8).reshape(height, width, 4)[..., :3]


def test_clip_and_dance_stay_at_one_moment(opened):
    page = opened()
    take_example(page, frames=25)
    make(page)
    wait_for_clip(page)
    places = "[...document.querySelectorAll('.player video')].map(one => one.currentTime)"
    page.evaluate("document.querySelectorAll('.player video')[1].pause()")
    for share in (250, 800, 0):
        page.evaluate(
            """share => { const line = document.querySelector(".timeline input");
            line.value = share; line.dispatchEvent(new Event("input")); }""",
            share,
        )
        until(page, f"(() => {{ const [a, b] = {places}; return Math.abs(a - b) < 0.05 }})()")
        dance, clip = page.evaluate(places)
        assert clip == pytest.approx(share / 1000 * 25 / 24, abs=0.03)
        assert dance == pytest.approx(clip, abs=0.05)
    page.click("[aria-label='One frame on']")
    until(page, f"Math.abs({places}[1] - 1 / 24) < 0.01")
    page.click("[aria-label='Play']")
    until(page, f"(() => {{ const [a, b] = {places}; return b > 0.4 && Math.abs(a - b) < 0.1 }})()")


def test_a_picture_of_how_far_it_is_replaces_the_veil(opened, served):
    """The service keeps it; whoever makes it is tested elsewhere, so that one is put there."""
    page = opened()
    take_example(page, frames=97)
    make(page)
    assert page.locator(".live img.veiled").count() == 1
    job = next(one["id"] for one in jobs(page) if one["status"] in ("IN_QUEUE", "IN_PROGRESS"))
    page.wait_for_selector(".steps [aria-current=step]")
    folder = served.state / "serve" / "previews"
    Image.new("RGB", (96, 160), (200, 40, 40)).save(folder / "made.png")
    (folder / "made.png").replace(folder / f"{job}.png")
    page.wait_for_selector(".live img:not(.veiled)")
    until(page, "document.querySelector('.live img').naturalWidth > 0")
    page.click("#cancel")
    page.wait_for_selector("#view-failed:not([hidden])", timeout=CLIP_MS)


def test_a_clip_that_is_called_off_ends_soon_and_says_so(opened):
    page = opened()
    take_example(page, frames=97)
    make(page)
    page.wait_for_selector(".steps [aria-current=step]")
    page.click("#cancel")
    page.wait_for_selector("#view-failed:not([hidden])", timeout=CLIP_MS)
    assert "Called off" in page.inner_text("#view-failed")
    assert [one["status"] for one in jobs(page) if one["action"] == "generate"] == ["CANCELLED"]
    page.click("text=Back to the plan")
    assert page.locator("#make").is_enabled()


def test_a_file_that_is_none_shows_its_sentence(opened, tmp_path):
    page = opened()
    take_example(page)
    wrong = tmp_path / "<img src=x onerror=alert(1)>.png"
    wrong.write_bytes(b"GIF was here once")
    page.set_input_files("#zone-picture input", wrong)
    page.wait_for_selector(".warnings li")
    assert "a JPEG, PNG, WebP, GIF or AVIF picture is expected" in page.inner_text("#view-plan")
    assert page.inner_text("#zone-picture .caption span") == wrong.name  # as text
    assert page.locator("#zone-picture .caption img").count() == 0
    page.click("#make")
    page.wait_for_selector("#view-failed:not([hidden])")
    assert "picture is expected" in page.inner_text("#view-failed .sentence")


def test_a_file_that_is_empty_is_told_at_once(opened, tmp_path):
    page = opened()
    (tmp_path / "nothing.png").touch()
    page.set_input_files("#zone-picture input", tmp_path / "nothing.png")
    assert "nothing.png is empty" in page.inner_text("#zone-picture [role=alert]")
    assert page.locator("#make").is_disabled()


DROP = """([selector, name, kind, bytes]) => {
  const carried = new DataTransfer();
  carried.items.add(new File([new Uint8Array(bytes)], name, { type: kind }));
  const how = { dataTransfer: carried, bubbles: true, cancelable: true };
  const target = document.querySelector(selector);
  for (const event of ["dragenter", "dragover", "drop"]) {
    target.dispatchEvent(new DragEvent(event, how));
  }
}"""


def test_files_that_are_dropped_find_their_place(opened):
    page = opened()
    picture = list((HOME / "nano" / "dancer.png").read_bytes())
    dance = list((HOME / "nano_scail2" / "driving.mp4").read_bytes())
    page.evaluate(DROP, ["#zone-picture .drop", "me.png", "image/png", picture])
    page.wait_for_selector("#zone-picture .caption span:text-is('me.png')")
    page.evaluate(DROP, ["#stage", "dance.mp4", "video/mp4", dance])
    page.wait_for_selector("#zone-motion .caption span:text-is('dance.mp4')")
    page.evaluate(DROP, ["body", "she.png", "image/png", picture])
    page.wait_for_selector("#zone-picture .caption span:text-is('she.png')")
    assert page.evaluate("document.body.className") == ""
    page.evaluate(DROP, ["body", "song.mp3", "audio/mpeg", [1, 2, 3]])
    page.wait_for_selector("#said :text('song.mp3 is neither a picture nor a video.')")
    page.wait_for_selector("#make:not([disabled])")  # both have arrived


def test_a_picture_of_another_shape_shows_what_is_cut_off(opened, tmp_path):
    page = opened()
    take_example(page)
    Image.new("RGB", (800, 400), (90, 120, 160)).save(tmp_path / "wide.png")
    page.set_input_files("#zone-picture input", tmp_path / "wide.png")
    until(page, "document.querySelector('#sizes input:checked').value === '160x96'")
    page.click("#sizes label:has(input[value='96x160'])")
    page.wait_for_selector("#view-plan .window")
    assert "The middle 30 % of the picture's width" in page.inner_text("#view-plan")
    pane = page.locator("#view-plan .window").bounding_box()
    frame = page.locator("#view-plan .frame").first.bounding_box()
    assert pane["width"] / frame["width"] == pytest.approx(0.3, abs=0.01)
    assert pane["height"] == pytest.approx(frame["height"], abs=1)


def test_the_first_frames_are_seen_before_anything_is_made(opened):
    page = opened()
    for place in (0, 1):  # a skeleton over the picture; masks over picture and dance
        take_example(page, place)
        page.wait_for_selector(".stills img")
        until(page, "document.querySelector('.stills img').naturalWidth > 0")
        width, height = page.evaluate(
            "(({ naturalWidth, naturalHeight }) => [naturalWidth, naturalHeight])"
            "(document.querySelector('.stills img'))"
        )
        assert width > height  # side by side
    asked = {one.get("action") or "generate" for one in jobs(page)}
    assert asked <= {"masks"}  # a question, which the shelf does not show


def test_who_becomes_whom_is_chosen_sent_and_shown_where_the_service_takes_it(opened, browser):
    """By a reply of the worker's action `masks`, put in the place of the service's."""
    context = browser.new_context(viewport=DESKTOP)
    asked = []
    still = io.BytesIO()
    Image.new("RGB", (64, 32), (10, 200, 10)).save(still, "JPEG")
    shown = {
        "stills": [base64.b64encode(still.getvalue()).decode()] * 3,
        "warnings": ["Person 2 is small."],
    }

    def run(route):
        body = route.request.post_data_json
        order = body["input"]
        if order.get("action") != "masks":  # the plan, of one person: the example has no other
            body["input"] = {k: v for k, v in order.items() if k not in ("who", "persons")}
            return route.continue_(post_data=json.dumps(body))
        asked.append(order)
        return route.fulfill(json={"id": "0" * 32, "status": "COMPLETED", "output": shown})

    context.route("**/run", run)
    page = opened(context)
    page.locator(".example").nth(1).click()
    page.fill("#persons", "2")
    page.select_option("[name=who-0]", "2")
    assert page.input_value("[name=who-1]") == "1"  # two never have one dancer
    page.click(".more summary")
    page.select_option("#framing", "as-is")
    page.wait_for_selector(".stills img >> nth=2")
    until(page, "document.querySelector('.stills img').naturalWidth === 64")
    page.wait_for_selector(".overlay .warnings :text('Person 2 is small.')")
    assert (asked[-1]["who"], asked[-1]["framing"], asked[-1]["persons"]) == ("2,1", "as-is", 2)
    context.close()


def test_a_preset_that_cannot_be_had_is_grey_and_says_why(opened, browser):
    context = browser.new_context(viewport=DESKTOP)

    def without(route):
        info = route.fetch().json()
        info["models"][0]["presets"][0] |= {"available": False, "why": "It needs <b>a LoRA</b>."}
        route.fulfill(json=info)

    context.route("**/info", without)
    page = opened(context)
    presets = page.locator("#presets label")
    assert presets.nth(0).locator("input").is_disabled()
    assert "It needs <b>a LoRA</b>." in presets.nth(0).inner_text()
    assert presets.nth(1).locator("input").is_checked()
    page.close()
    context.close()


def test_two_tabs_of_a_visitor_queue_and_see_each_other(opened):
    first = opened()
    take_example(first, frames=97)
    make(first)
    second = opened(first.context)
    second.locator(".example").first.click()
    second.wait_for_selector("#make:not([disabled])")
    second.click("#make")
    second.wait_for_selector("#view-running h2:text-is('Waiting')")
    until(second, "document.getElementById('view-running').textContent.includes('It is next')")
    until(second, "document.querySelectorAll('#cards .card').length === 2")
    until(first, "document.querySelectorAll('#cards .card').length === 2")
    second.click("#cancel")
    second.wait_for_selector("#view-failed:not([hidden])")
    first.click("#cancel")
    first.wait_for_selector("#view-failed:not([hidden])", timeout=CLIP_MS)
    stranger = opened()
    assert stranger.locator("#shelf").is_hidden()


def test_an_earlier_clip_opens_from_the_shelf_and_gives_its_settings_back(opened):
    page = opened()
    take_example(page)
    page.fill("#seed", "5")
    page.dispatch_event("#seed", "change")
    make(page)
    wait_for_clip(page)
    page.reload()
    page.wait_for_selector("#cards .card .open")
    page.click("#cards .card .open")
    page.wait_for_selector("#view-finished:not([hidden])")
    page.click("text=Use settings")
    assert page.input_value("#seed") == "5"
    page.wait_for_selector("#make:not([disabled])")
    assert page.inner_text("#frames-text").startswith(f"{SHORT} frames")
    page.click(".more summary")
    page.fill("#price", "36")  # a cent a second
    page.wait_for_selector("#view-plan .facts dt:text-is('Cost')")
    seconds, cents = (re.findall(r"[\d.]+", told(page, name))[0] for name in ("Time", "Cost"))
    assert float(cents) == pytest.approx(float(seconds) / 100, rel=0.1)


NEEDS_JQ = pytest.mark.skipif(None in map(shutil.which, ("curl", "jq")), reason="no curl or no jq")


@pytest.mark.parametrize("name", ["Python", pytest.param("curl", marks=NEEDS_JQ)])
def test_a_snippet_makes_the_very_clip_with_files_that_lie_beside_it(
    opened, served, tmp_path, name
):
    page = opened()
    take_example(page)
    mine = tmp_path / "my 'own', $picture; 1.png"  # sent by the page, and then by the program
    mine.write_bytes((HOME / "nano" / "dancer.png").read_bytes())
    page.set_input_files("#zone-picture input", mine)
    page.wait_for_selector("#make:not([disabled])")
    make(page)
    wait_for_clip(page)
    job = next(one for one in jobs(page) if one["status"] == "COMPLETED")
    assert job["input"]["image_path"].startswith("upload:")
    page.click(".snippets summary")
    page.click(f"role=tab[name='{name}']")
    program = page.inner_text("#snippet")
    shell = [sys.executable, "-c"] if name == "Python" else ["sh", "-c"]
    subprocess.run([*shell, program], cwd=tmp_path, check=True, timeout=240)
    first = served.state / "serve" / "results" / f"{job['id']}.mp4"
    np.testing.assert_array_equal(frames_of(first), frames_of(tmp_path / "clip.mp4"))


def test_the_settings_of_a_clip_come_back_when_it_is_dropped_on_the_page(opened, served):
    page = opened()
    if "settings" not in page.evaluate(
        "async () => (await (await fetch('/info')).json()).features"
    ):
        pytest.skip("this service reads no settings out of a clip")
    take_example(page)
    page.fill("#seed", "23")
    page.dispatch_event("#seed", "change")
    page.click(".more summary")
    page.fill("#prompt", "she <b>dances</b> & laughs")
    make(page)
    wait_for_clip(page)
    job = next(one for one in jobs(page) if one["status"] == "COMPLETED")
    clip = served.state / "serve" / "results" / f"{job['id']}.mp4"
    fresh = opened()
    fresh.set_input_files("#restore-file", clip)
    until(fresh, "document.getElementById('seed').value === '23'")
    assert fresh.input_value("#prompt") == "she <b>dances</b> & laughs"
    assert fresh.inner_text("#frames-text").startswith(f"{SHORT} frames")


def test_scail_2_has_its_modes_and_masks(opened):
    page = opened()
    take_example(page, place=1)
    assert page.locator("#mode-field").is_visible()
    assert "dancer_mask.png" in page.inner_text("#masks")
    page.click("#modes label:has-text('Replaces')")
    until(page, "document.getElementById('make-why').textContent.includes('frames')")
    make(page)
    job = next(one for one in jobs(page) if one["status"] in ("IN_QUEUE", "IN_PROGRESS"))
    assert job["input"]["mode"] == "replacement"
    assert job["input"]["mask_path"] == "example:scail2/driving_mask.npz"
    page.click("#cancel")
    page.wait_for_selector("#view-failed:not([hidden])", timeout=CLIP_MS)


def test_a_phone_shows_all_of_it_without_scrolling_sideways(opened):
    page = opened(viewport=PHONE, has_touch=True, is_mobile=True)
    take_example(page)
    wide = "document.documentElement.scrollWidth"
    assert page.evaluate(wide) <= PHONE["width"]
    make(page)
    assert page.evaluate(wide) <= PHONE["width"]
    wait_for_clip(page)
    assert page.evaluate(wide) <= PHONE["width"]
    page.click(".snippets summary")
    assert page.evaluate(wide) <= PHONE["width"]
    small = page.evaluate(
        """() => [...document.querySelectorAll("button, summary, select, a.plain")]
        .filter(one => one.offsetParent).map(one => [one.textContent.trim(), one.getBoundingClientRect()])
        .filter(([, box]) => box.width < 24 || box.height < 24).map(([text]) => text)"""  # noqa: E501
    )
    assert small == []


def test_the_keyboard_reaches_everything_and_makes_a_clip(opened):
    page = opened()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Go to the clip"
    tab_to(page, ".example")
    page.keyboard.press("Enter")
    page.wait_for_selector("#frames:not([disabled])")
    reached = set()
    page.evaluate("document.querySelector('.more').open = true")
    page.focus(".skip")
    for _ in range(60):
        page.keyboard.press("Tab")
        name = page.evaluate(
            """() => { const it = document.activeElement;
            return it.id || it.name || it.getAttribute("aria-label") || it.textContent.trim(); }"""
        )
        outline = page.evaluate(SEEN_FOCUS)
        assert outline, f"the focus on {name} cannot be seen"
        reached.add(name)
        if name == "make":
            break
    wanted = {"model", "preset", "size", "frames", "seed", "dice", "prompt", "fps", "fit", "price",
              "audio", "persons", "is-skeleton", "restore", "make", "Picture: choose a file",
              "Dance: choose a file"}  # fmt: skip
    assert wanted - reached == set()
    choose_frames(page, SHORT)
    page.focus("#make")
    page.keyboard.press("Enter")
    wait_for_clip(page)
    page.focus("#stage")
    tab_to(page, ".timeline .play")
    page.keyboard.press("Enter")
    until(page, "document.querySelectorAll('.player video')[1].paused")


SEEN_FOCUS = """() => {
  for (let it = document.activeElement; it && it !== document.body; it = it.parentElement) {
    const style = getComputedStyle(it);
    if (style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 1) return true;
  }
  return false;
}"""


def tab_to(page, selector):
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
    raise AssertionError(f"Tab never comes to {selector}")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(opened, request, scheme):
    source = axe(Path(request.config.cache.mkdir("axe")))
    page = opened(color_scheme=scheme, reduced_motion="reduce")

    def check(where):
        page.wait_for_timeout(400)
        page.evaluate(source)
        found = page.evaluate("async () => (await axe.run()).violations")
        serious = [(one["id"], [node["html"][:120] for node in one["nodes"]]) for one in found
                   if one["impact"] in ("serious", "critical")]  # fmt: skip
        assert serious == [], where

    check("empty")
    take_example(page)
    page.evaluate("document.querySelector('.more').open = true")
    check("plan")
    make(page)
    check("running")
    wait_for_clip(page)
    page.click(".snippets summary")
    check("finished")


def test_a_service_with_a_token_asks_for_it_and_plays_all_the_same(browser, tmp_path):
    token = "a-token-of-this-test"
    with service(tmp_path, SCAIL_TOKEN=token) as running:
        page = browser.new_context(viewport=DESKTOP).new_page()
        page.set_default_timeout(START_MS)
        addresses = []
        page.on("request", lambda request: addresses.append(request.url))
        page.goto(running.address)
        page.wait_for_selector("#token-dialog[open]")
        page.fill("#token", "not this one")
        page.keyboard.press("Enter")
        until(page, "document.getElementById('token-said').textContent !== ''")
        page.fill("#token", token)
        page.keyboard.press("Enter")
        page.wait_for_selector(".example:not([disabled])")
        take_example(page)
        make(page)
        wait_for_clip(page)
        assert not [one for one in addresses if token in one]
        assert re.match("blob:", page.get_attribute(".player video >> nth=1", "src"))
        page.context.close()
    assert token not in (tmp_path / "log.txt").read_text("utf-8")

"""The files of the page by themselves: no build, no inline code, nothing from elsewhere."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from engine.pose.camera import base_camera

HOME = Path(__file__).resolve().parents[2] / "engine" / "playground"
DANCE = HOME.parent / "demo" / "nano" / "dance.npz"
FILES = sorted(path for path in HOME.rglob("*") if path.is_file())
SCRIPTS = sorted((HOME / "js").glob("*.js"))
SHEETS = sorted((HOME / "style").glob("*.css"))
NAMESPACE = "http://www.w3.org/2000/svg"  # a name, which nobody fetches
NODE = shutil.which("node")


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []
        self.in_script = self.script = ""
        self.feed((HOME / "index.html").read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self.in_script = tag in ("script", "style") and tag

    def handle_endtag(self, tag):
        self.in_script = ""

    def handle_data(self, data):
        if self.in_script:
            self.script += data


@pytest.fixture(scope="module")
def tags():
    return _Tags()


def test_the_page_has_no_inline_script_style_or_handler(tags):
    assert tags.script.strip() == ""
    names = {name for _, attributes in tags.found for name in attributes}
    assert {name for name in names if name == "style" or name.startswith("on")} == set()
    assert "style" not in {tag for tag, _ in tags.found}


def test_every_file_that_the_page_names_is_there_and_every_file_is_named(tags):
    named = {value for _, attributes in tags.found for name, value in attributes.items()
             if name in ("src", "href") and not value.startswith("#")}  # fmt: skip
    imported = {
        f"js/{name}"
        for script in SCRIPTS
        for name in re.findall(r'from "\./([^"]+)"', script.read_text("utf-8"))
    }
    there = {path.relative_to(HOME).as_posix() for path in FILES}
    assert named | imported | {"index.html"} == there


def test_every_id_is_there_once_and_every_one_that_is_looked_for_exists(tags):
    ids = [attributes["id"] for _, attributes in tags.found if "id" in attributes]
    assert sorted(ids) == sorted(set(ids))
    looked_for = {
        name
        for script in SCRIPTS
        for name in re.findall(r'\bfind\("([^"]+)"\)', script.read_text("utf-8"))
    }
    assert looked_for - set(ids) == set()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_comes_from_elsewhere(path):
    text = path.read_text("utf-8").replace(NAMESPACE, "")
    assert re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}|@import|\burl\(", text) == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_text_is_never_read_as_html_or_code(path):
    text = path.read_text("utf-8")
    ways = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc"
    assert re.findall(ways, text) == []


@pytest.mark.parametrize("path", [*SCRIPTS, *SHEETS], ids=lambda path: path.name)
def test_a_file_answers_one_question_and_begins_with_it(path):
    lines = path.read_text("utf-8").splitlines()
    assert lines[0].startswith("// " if path.suffix == ".js" else "/* ")
    assert len(lines) <= 450


def test_the_dancer_of_the_empty_stage_is_the_shipped_dance():
    """Every second frame, projected by the camera that joints are drawn with, to +-100."""
    with np.load(DANCE) as held:
        joints = held["joints"][::2, 0].astype(np.float64)  # [T, 24, 3]
        every = held["joints"][:, 0].astype(np.float64)
        focal = base_camera(int(held["height"]), int(held["width"])).fx
    shown = [1, 2, 4, 5, 7, 8, 12, 15, 16, 17, 18, 19, 20, 21]  # SMPL joints that bones end at
    flat = every[:, shown, :2] * focal / every[:, shown, 2:]
    low, high = flat.min((0, 1)), flat.max((0, 1))
    points = joints[:, shown, :2] * focal / joints[:, shown, 2:]
    expected = (points - (low + high) / 2) / (high - low).max() * 200
    rows = re.search(r"`\n(.*?)\n`", (HOME / "js" / "dance.js").read_text("utf-8"), re.DOTALL)
    found = np.array([row.split() for row in rows[1].splitlines()], float).reshape(-1, 14, 2)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=0.51)


@pytest.mark.skipif(NODE is None, reason="there is no node here, which reads JavaScript")
def test_snippets_write_what_a_stranger_typed_as_text_of_each_language():
    """A prompt with quotes, dollars, backslashes and other alphabets comes back the same."""
    prompt = "a \"quoted\" 'dance' $HOME `id` \\n 舞 \U0001f483 {{x}}"
    program = f"""
    import {{ curl, n8n, pythonProgram, recipeFor }} from "{(HOME / "js" / "snippets.js").as_uri()}";
    const input = {{ prompt: {json.dumps(prompt)}, image_path: "upload:{"0" * 32}", output: "url" }};
    const recipe = recipeFor(input, "preview", 7, {{ image_path: "my 'face'.png" }}, "http://h:1");
    console.log(JSON.stringify([curl(recipe, true), pythonProgram(recipe, true), n8n(recipe, true)]));
    """  # noqa: E501 - a line of JavaScript
    told = subprocess.run(
        [NODE, "--input-type=module"], input=program.encode(), capture_output=True, check=True
    )
    shell, python, n8n = json.loads(told.stdout)

    asked = shell.split("order=", 2)[1]
    order = subprocess.run(
        ["sh", "-c", f'order={asked}\nprintf %s "$order"'], capture_output=True, check=True
    ).stdout
    assert json.loads(order) == {
        "model": "preview", "input": {"prompt": prompt, "seed": 7, "output": "url"}
    }  # fmt: skip
    assert "--arg file0 \"$(send 'my '\\''face'\\''.png')\"" in shell
    assert subprocess.run(["sh", "-n"], input=shell.encode(), capture_output=True).stderr == b""

    sent = {}
    lines = python.split("order = ")[1].split("\njob = ")[0]
    held = {"send": lambda name: sent.setdefault("name", name), "__builtins__": {}}
    exec(compile(f"order = {lines}", "snippet", "exec"), held)
    assert held["order"]["input"]["prompt"] == prompt
    assert sent == {"name": "my 'face'.png"}
    compile(python, "snippet", "exec")

    workflow = json.loads(n8n)
    names = [node["name"] for node in workflow["nodes"]]
    ends = [
        to["node"] for way in workflow["connections"].values() for out in way["main"] for to in out
    ]
    assert set(ends) <= set(names)
    [body] = [node["parameters"]["jsonBody"] for node in workflow["nodes"]
              if "jsonBody" in node["parameters"]]  # fmt: skip
    assert body.index("}}") == len(body) - 2  # the expression ends where it should
    assert {"Read 1", "Send 1", "Order the clip", "Wait", "How far", "The clip"} <= set(names)

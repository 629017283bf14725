"""Text is UTF-8 wherever the engine runs: no file is opened as the locale has it."""

import ast

import pytest

from tests.house.test_layers import MODULES, ROOT

STARTS = ("run", "Popen", "check_output")  # of `subprocess`


def said(call, at, name):
    """A constant argument, by place or by name; None where it is another or is not given."""
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    value = call.args[at] if len(call.args) > at else given.get(name)
    return value.value if isinstance(value, ast.Constant) else None


def name_of(call):
    called = call.func
    return called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")


def is_by_locale(call):
    """Tells whether a call reads or writes text in whatever encoding the locale has."""
    name, given = name_of(call), {keyword.arg for keyword in call.keywords}
    if "encoding" in given:
        return False
    if name == "read_text":
        return not call.args
    if name == "write_text":
        return len(call.args) < 2
    if name in STARTS:
        return bool({"text", "universal_newlines"} & given)
    if name in ("NamedTemporaryFile", "TemporaryFile"):
        return "b" not in (said(call, 0, "mode") or "b")
    if name in ("TextIOWrapper", "FileHandler"):
        return len(call.args) < 2
    if name == "open" and isinstance(call.func, ast.Name):
        return "b" not in (said(call, 1, "mode") or "r")
    if name == "open":  # a path's has its mode first; others open by name
        mode = said(call, 0, "mode")
        return (not call.args and mode is None) or (
            isinstance(mode, str) and {*mode} <= {*"rwxat+"}
        )
    return False


def test_no_text_is_read_or_written_as_the_locale_has_it():
    found = []
    for path, _ in MODULES:
        calls = (node for node in ast.walk(ast.parse(path.read_bytes())) if type(node) is ast.Call)
        lines = (call.lineno for call in calls if is_by_locale(call))
        found += [f"{path.relative_to(ROOT)}:{line}" for line in lines]
    assert found == []


@pytest.mark.parametrize(
    "text",
    ["p.read_text()", "p.write_text(x)", "p.open()", "p.open('w')", "p.open(mode='a+')",
     "open(p)", "open(p, 'rt')", "subprocess.run(c, text=True)", "TemporaryFile('w+')"],
)  # fmt: skip
def test_the_rule_sees_what_it_is_for(text):
    assert is_by_locale(ast.parse(text, mode="eval").body)


@pytest.mark.parametrize(
    "text",
    ["p.read_text('utf-8')", "p.write_text(x, encoding='utf-8')", "p.open('rb')", "open(p, 'xb')",
     "archive.open(member)", "TemporaryFile()", "subprocess.run(c, capture_output=True)"],
)  # fmt: skip
def test_the_rule_leaves_the_rest_alone(text):
    assert not is_by_locale(ast.parse(text, mode="eval").body)

"""Who may ask the service: hosts, origins, tokens, and whom the page's own files are for."""

import pytest

from engine.errors import BadRequest
from engine.server.house import is_loopback, read_house
from tests.support.services import Serving

TOKEN = "a-token-of-many-characters"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    (folder / "index.html").write_text("<!doctype html><title>page</title>")
    (folder / "js").mkdir()
    (folder / "js" / "page.js").write_text("1")
    (folder / ".secret.js").write_text("secret")
    (folder / "notes.py").write_text("secret")
    return folder


@pytest.fixture(scope="module")
def service(tmp_path_factory, page):
    started = Serving(tmp_path_factory.mktemp("service"), page=page)
    yield started
    started.stop()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory, page):
    names = frozenset({"localhost", "127.0.0.1", "gpu.example"})
    started = Serving(
        tmp_path_factory.mktemp("guarded"), page=page, token=TOKEN, names=names, takes_numeric=True
    )
    yield started
    started.stop()


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:80", "localhost.evil.example", "192.168.1.7", "", "localhost@x",
     "127.0.0.1.evil.example", "localhost/x", "[::1", "localhost:x", "0.0.0.0"],
)  # fmt: skip
def test_a_host_of_another_name_is_refused_as_a_name_that_was_pointed_here(service, host):
    for method, path in (("GET", "/info"), ("GET", "/"), ("POST", "/run"), ("GET", "/health")):
        status, told = service.ask(method, path, Host=host)
        assert (status, told["code"]) == (421, "foreign_host")


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:{port}", "127.0.0.1:9", "[::1]:1", "localhost."]
)
def test_the_names_of_this_machine_are_its_own(service, host):
    assert service.ask("GET", "/info", Host=host.format(port=service.port))[0] == 200


def test_a_numeric_address_is_one_of_a_service_that_others_reach(guarded):
    for host in ("192.168.1.7:8188", "gpu.example", "[fd00::1]"):
        assert guarded.ask("GET", "/health", Host=host)[0] == 200
    assert guarded.ask("GET", "/health", Host="evil.example")[0] == 421


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "null", "", "http://localhost:1", "https://127.0.0.1.evil.example",
     "file://", "http://127.0.0.1:{port}.evil.example", "http://localhost:{port}/", "chrome://x"],
)  # fmt: skip
def test_a_foreign_origin_is_refused_whatever_it_asks(service, origin):
    origin = origin.format(port=service.port)
    host = f"localhost:{service.port}"
    for method, path in (
        ("POST", "/run"),
        ("GET", "/info"),
        ("POST", "/cancel/x"),
        ("OPTIONS", "/run"),
    ):
        status, told = service.ask(method, path, Host=host, Origin=origin)
        assert (status, told["code"]) == (403, "foreign_origin")


def test_its_own_page_may_ask_and_no_other_is_told_that_it_may(service):
    for name in ("localhost", "127.0.0.1"):
        host = f"{name}:{service.port}"
        own = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
        status, headers, _ = service.send("GET", "/info", headers=own)
        assert status == 200
        assert not [header for header in headers if header.lower().startswith("access-control")]
        assert headers["content-security-policy"].startswith(
            "default-src 'none'; script-src 'self'"
        )
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_what_a_browser_says_another_site_has_asked_for_is_refused(service, site):
    said = {"Sec_Fetch_Site": site}
    for path in ("/info", "/results/x.mp4", "/examples/preview/dancer.png", "/js/page.js"):
        assert service.ask("GET", path, **said)[0] == 403
        assert service.ask("GET", path, Sec_Fetch_Dest="document", **said)[0] == 403
    headers = {"Sec-Fetch-Site": site, "Sec-Fetch-Dest": "document"}
    assert service.send("GET", "/", headers=headers)[0] == 200  # a link to the page


def test_without_the_token_nothing_is_told_but_the_page_and_that_it_is_there(guarded):
    for path in ("/info", "/jobs", "/docs", "/openapi.json", "/status/x", "/results/x.mp4", "/x"):
        status, headers, _ = guarded.send("GET", path)
        assert (status, headers["www-authenticate"]) == (401, "Bearer")
    for path in ("/run", "/runsync", "/uploads", "/cancel/x"):
        assert guarded.ask("POST", path, {"input": {}})[0] == 401
    assert guarded.ask("GET", "/health")[1].keys() == {"status"}
    assert guarded.send("GET", "/")[0] == 200
    assert guarded.send("GET", "/js/page.js")[0] == 200


@pytest.mark.parametrize(
    "given",
    ["Bearer", "Bearer ", f"Basic {TOKEN}", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", TOKEN,
     f"Bearer {TOKEN.upper()}", "Bearer é", f"Bearer {TOKEN} {TOKEN}", "Bearer " + "x" * 9000],
)  # fmt: skip
def test_a_wrong_token_is_none(guarded, given):
    status, told = guarded.ask("GET", "/info", Authorization=given.encode("latin-1"))
    assert (status, told["code"]) == (401, "no_token")
    assert TOKEN not in told["error"]


def test_the_token_opens_in_its_header_and_nowhere_else(guarded):
    assert guarded.ask("GET", "/info", Authorization=f"Bearer {TOKEN}")[1]["needs_token"] is True
    assert guarded.ask("GET", "/health", Authorization=f"bearer {TOKEN}")[1]["gpu"] == "no GPU"
    assert guarded.ask("GET", f"/info?token={TOKEN}")[0] == 401
    assert guarded.ask("GET", "/info", Cookie=f"token={TOKEN}")[0] == 401


@pytest.mark.parametrize(
    "path",
    ["/../engine/config.py", "/%2e%2e/x.js", "/js/../../x.js", "/.secret.js", "/notes.py", "//x.js",
     "/js/", "/js", "/js//page.js", "/js/page.js/", "/%00.js", "/index.html%00", "/js\\page.js",
     "/é.js", "/" + "a/" * 50 + "x.js", "/" + "x" * 5000 + ".js"],
)  # fmt: skip
def test_only_the_pages_own_files_are_given_out(service, path):
    path = path.replace("é", "%C3%A9")
    status, told = service.ask("GET", path)
    assert (status, told["code"]) == (404, "unknown")


def test_the_page_and_the_routes_come_with_nothing_from_elsewhere(service):
    status, headers, body = service.send("GET", "/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert body == b"<!doctype html><title>page</title>"
    _, headers, body = service.send("GET", "/js/page.js")
    assert (headers["content-type"], body) == ("text/javascript; charset=utf-8", b"1")
    _, headers, body = service.send("GET", "/docs")
    assert b"POST /run" in body
    assert b"http" not in body.replace(b"HTTP", b"")
    assert b"<script" not in body
    status, schema = service.ask("GET", "/openapi.json")
    assert {"/run", "/runsync", "/status/{job}", "/cancel/{job}", "/stream/{job}", "/health",
            "/uploads", "/results/{name}", "/info"} < {*schema["paths"]}  # fmt: skip


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.7", "gpu.example", "::", ""])
def test_a_host_that_others_reach_needs_a_token(host, monkeypatch):
    monkeypatch.delenv("SCAIL_TOKEN", raising=False)
    with pytest.raises(BadRequest, match=r"so that a token is needed\. Set SCAIL_TOKEN"):
        read_house(host, 8188)
    monkeypatch.setenv("SCAIL_TOKEN", "short")
    with pytest.raises(BadRequest, match="SCAIL_TOKEN is no token: 16"):
        read_house(host, 8188)
    monkeypatch.setenv("SCAIL_TOKEN", TOKEN)
    monkeypatch.setenv("SCAIL_HOSTS", "Gpu.Example, other ,")
    house = read_house(host, 8188)
    assert {"gpu.example", "other", "localhost"} < house.names
    assert (house.takes_numeric, TOKEN in repr(house)) == (True, False)


def test_loopback_needs_none(monkeypatch):
    monkeypatch.delenv("SCAIL_TOKEN", raising=False)
    assert [is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost")] == [
        True
    ] * 4
    house = read_house("127.0.0.1", 8188)
    assert (house.token, house.takes_numeric) == (None, False)
    assert house.names == {"localhost", "127.0.0.1", "::1"}

"""make docs: the site builds without a warning, and every page of it works in a browser that has no network."""

from __future__ import annotations

import functools
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.cpu_only("is about texts"),
    pytest.mark.slow("builds the site and opens all of it in a browser"),
]

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
MOBILE = 360  # CSS pixels

# Opens each page in a frame as wide as a telephone, and writes down what is wrong with it.
CRAWLER = """<!doctype html><link rel="icon" href="data:,"><title>crawler</title><body><script>
const pages = PAGES, problems = [], links = [], names = {};
function open(path) {
  return new Promise(done => {
    const frame = document.createElement("iframe");
    frame.style.width = "WIDTHpx"; frame.style.height = "800px";
    frame.onload = () => done(frame);
    frame.src = "/" + path;
    document.body.append(frame);
  });
}
async function look(path) {
  const frame = await open(path), page = frame.contentDocument;
  names[path] = new Set([...page.querySelectorAll("[id]")].map(e => e.id));
  for (const image of page.images)
    if (!image.complete || !image.naturalWidth) problems.push([path, "image", image.src]);
  for (const link of page.querySelectorAll("a[href]")) {
    const url = new URL(link.href);
    if (url.origin === location.origin)
      links.push([path, decodeURIComponent(url.pathname).slice(1), decodeURIComponent(url.hash).slice(1)]);
  }
  for (const entry of frame.contentWindow.performance.getEntriesByType("resource")) {
    if (!/^(data|blob):/.test(entry.name) && new URL(entry.name).origin !== location.origin)
      problems.push([path, "network", entry.name]);
    else if (entry.responseStatus >= 400) problems.push([path, "request", entry.name]);
  }
  const width = page.documentElement.scrollWidth;
  if (width > WIDTH) problems.push([path, "wide", width]);
  frame.remove();
}
(async () => {
  for (const path of pages) await look(path);
  for (const [page, path, anchor] of links) {
    const target = path === "" ? "index.html" : path;
    if (!(target in names)) problems.push([page, "link", target]);
    else if (anchor && !names[target].has(anchor)) problems.push([page, "anchor", target + "#" + anchor]);
  }
  const result = {problems, pages: pages.length, links: links.length};
  await fetch("/result", {method: "POST", body: JSON.stringify(result)});
})();
</script>"""


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder, and takes what the crawler sends."""

    result: dict[str, Any] | None = None

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        self.ended = threading.Event()


class Handler(http.server.SimpleHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.result = json.loads(body)
        self.send_response(204)
        self.end_headers()
        self.server.ended.set()


@contextmanager
def served(folder: Path) -> Iterator[Server]:
    with Server(folder) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def crawl(site: Path, scratch: Path) -> tuple[dict[str, Any], list[str]]:
    """What the crawler found, and all that pages wrote to the console."""
    pages = [str(p.relative_to(site)) for p in sorted(site.rglob("*.html")) if p.name != "404.html"]
    text = CRAWLER.replace("PAGES", json.dumps(pages)).replace("WIDTH", str(MOBILE))
    (site / "crawler.html").write_text(text)
    assert CHROMIUM is not None
    command = [
        *(CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *(f"--user-data-dir={scratch}", "--no-first-run", "--disable-background-networking"),
        *("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--hide-scrollbars"),
        "--enable-logging=stderr",
    ]
    log = scratch.with_suffix(".log")
    with served(site) as server, log.open("w") as output:
        address = f"http://127.0.0.1:{server.server_port}/crawler.html"
        browser = subprocess.Popen(
            [*command, address], stdout=output, stderr=output, start_new_session=True
        )
        try:
            ended = server.ended.wait(90)
        finally:
            os.killpg(browser.pid, signal.SIGKILL)
            browser.wait()
    (site / "crawler.html").unlink()
    written = log.read_text(errors="replace")
    assert ended and server.result is not None, f"the crawler did not end\n{written[-4000:]}"
    return server.result, [line for line in written.splitlines() if "CONSOLE" in line]


def build(site: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@needs_browser
@pytest.mark.skipif(
    not all(map(find_spec, ("mkdocs", "material", "mkdocstrings", "latex2mathml"))),
    reason="not all of requirements-docs.txt is installed",
)
def test_every_page_works(tmp_path: Path) -> None:
    site = tmp_path / "site"
    run = build(site)
    assert run.returncode == 0, run.stdout + run.stderr
    result, console = crawl(site, tmp_path / "profile")
    assert result["problems"] == []
    assert console == []
    assert result["pages"] >= 30 and result["links"] > 1000
    for page in site.rglob("*.html"):
        shown = page.read_text()
        for left in (
            ":class:`",
            ":func:`",
            ":math:`",
            "<!-- figure:",
            "<!-- examples -->",
            "\\begin{",
            "??? note",
        ):
            assert left not in shown, (page, left)


def test_examples_are_those_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page names each program with its docstring, and builds without any."""
    pytest.importorskip("mkdocs", reason="mkdocs, of requirements-docs.txt, is not installed")
    pytest.importorskip("latex2mathml", reason="latex2mathml is not installed")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import hooks

    assert "no example" in hooks.examples(tmp_path)
    (tmp_path / "b.py").write_text('"""Trains b.\n\nLonger."""\nimport braze\n')
    (tmp_path / "a.py").write_text("import braze\n")
    shown = hooks.examples(tmp_path)
    assert shown.index("## a\n") < shown.index("## b\n")
    assert "Trains b." in shown and "Longer." in shown and "python examples/b.py" in shown


@needs_browser
def test_control_what_is_broken_is_noticed(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    head = '<!doctype html><link rel="icon" href="data:,">'
    (site / "index.html").write_text(
        f'{head}<h1 id="top">x</h1><a href="index.html#top">fine</a><a href="#none">anchor</a>'
        f'<a href="gone.html">link</a><img src="gone.png">'
        f'<div style="width: {MOBILE + 100}px">wide</div>'
    )
    (site / "script.html").write_text(
        f"{head}<script>console.error('told so'); missing();</script>"
    )
    (site / "network.html").write_text(f'{head}<script src="https://cdn.invalid/x.js"></script>')
    result, console = crawl(site, tmp_path / "profile")
    assert {tuple(problem[:2]) for problem in result["problems"]} == {
        *(("index.html", kind) for kind in ("anchor", "link", "image", "request", "wide")),
        ("network.html", "network"),
    }
    assert result["pages"] == 3 and result["links"] == 3
    for words in ("told so", "missing is not defined"):
        assert any(words in line for line in console), (words, console)

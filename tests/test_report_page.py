"""The pages of a report: what they hold, hostile contents, and how Chromium shows them."""

import html
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import matplotlib
import pytest
from report_folders import demo_comparison, write_comparison, write_json, write_run

from nomadam.reports import write_report

PAYLOAD = "</style></script><img src=http://a.test/x onerror=parent.pwned=1><script>parent.pwned=1"
HOSTILE = [
    PAYLOAD,
    "\"'><svg onload=parent.pwned=1>",
    "--><!-- ]]> &lt;b&gt; <b>bold",
    "[x](javascript:alert(1)) ![y](http://a.test/z) `c` | cell | *e* <!-- $\\frac{$ ~~s~~",
    "_hidden $x_{1$ \u202egnp.exe \ud800 \u0000 \x1b[31m",
    "# head\n- list\n\n---\n<details>",
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo")
    folder = demo_comparison(root, seeds=2)
    return folder, write_report([folder], root / "report")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A report in which whatever a file can say is hostile."""
    root = tmp_path_factory.mktemp("hostile")
    members = []
    for index, text in enumerate(HOSTILE):
        folder = root / f"run <i>{index}"
        write_run(folder, "sgd_sai", seed=index % 2, steps=20, layers=1)
        for name in ("run.json", "environment.json", "result.json"):
            values = json.loads((folder / name).read_text())
            if name == "run.json":
                values["run"]["name"] = text
                values["run"]["optimizer"]["name"] = text
                values["run"]["optimizer"]["arguments"] = {text: text, "long": text * 200}
                values["data"]["source"] = text
                values["optimizer_summary"] = text
            values[text] = text
            values["command"] = [text, text]
            values["steps"] = text
            write_json(folder / name, values)
        gains = {text + name: block for name, block in read_gains(folder).items()}
        write_json(folder / "gains.json", {"blocks": gains})
        with (folder / "metrics.jsonl").open("a", errors="surrogatepass") as file:
            file.write(json.dumps({"step": text}) + "\n" + text.replace("\n", " ") + "\n")
        members.append((text, folder))
    write_comparison(root / "all", members, name=PAYLOAD, reference=HOSTILE[1])
    return write_report([root / "all"], root / "all" / PAYLOAD.replace("/", "_"))


def read_gains(folder):
    return json.loads((folder / "gains.json").read_text())["blocks"]


class Tags(HTMLParser):
    """Every tag and attribute that a browser would see."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.found = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_comment(self, data):
        self.found.append(("comment", {}))


def named(paths, name):
    return next(path for path in paths if path.name == name)


def test_files_are_written_and_listed(demo):
    _, paths = demo
    assert [path.name for path in paths[:2]] == ["report.md", "report.html"]
    names = {path.name for path in paths[2:]}
    for figure in (
        "learning_curves_steps", "learning_curves_tokens", "learning_curves_seconds",
        "optimizer_state", "peak_memory", "optimizer_step", "gains_by_block",
        "gains_relative_to_sqrt_numel",
    ):  # fmt: skip
        assert {f"{figure}.png", f"{figure}.svg"} <= names
    for path in paths:
        assert path.stat().st_size > 1000
        assert path.suffix != ".png" or path.read_bytes().startswith(b"\x89PNG\r\n")
    # One learning rate an optimizer is no grid.
    assert "learning_rate_sensitivity.png" not in names


def test_the_same_folders_give_the_same_bytes_and_settings_stay(demo, tmp_path):
    folder, paths = demo
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 30, "axes.grid": False, "svg.hashsalt": None}):
        again = write_report([folder], tmp_path / "again")
    assert [p.name for p in again] == [p.name for p in paths]
    for one, two in zip(paths, again, strict=True):
        assert one.read_bytes() == two.read_bytes(), one.name
    assert dict(matplotlib.rcParams) == before


def test_page_shows_configuration_data_and_environment(demo):
    _, paths = demo
    for name in ("report.html", "report.md"):
        text = named(paths, name).read_text().replace("<wbr>", "")
        for wanted in ("optimizer.lr", "0.003", "batch_size", "3f3f3f3f", "git_commit", "63b0ffe",
                       "x86_64, 2 cores", "seed=1", "mean over the last 7 steps",
                       "± one standard deviation"):  # fmt: skip
            assert wanted in text, (name, wanted)
    assert "Content-Security-Policy" in named(paths, "report.html").read_text()


def test_everything_hostile_is_escaped_in_the_page(hostile):
    text = named(hostile, "report.html").read_text()
    tags = Tags(text).found
    allowed = set(
        "html head meta title style body main h1 h2 p ul li div table thead tbody tr th td "
        "figure img figcaption strong code dl dt dd wbr".split()
    )
    assert {tag for tag, _ in tags} == allowed
    for tag, attributes in tags:
        assert not any(key.startswith("on") or key in ("style", "href") for key in attributes)
        if "src" in attributes:
            assert tag == "img" and attributes["src"].startswith("data:image/svg+xml;base64,")
    pictures = sum(path.suffix == ".svg" for path in hostile)
    assert sum(tag == "img" for tag, _ in tags) == pictures > 5
    assert "\u202e" not in text and "\x1b" not in text and "\x00" not in text
    assert "onerror" in text and "&lt;script&gt;parent.pwned=1" in text


def test_everything_hostile_is_escaped_in_markdown_and_drawings(hostile):
    markdown_it = pytest.importorskip("markdown_it")
    text = named(hostile, "report.md").read_text()
    rendered = markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    tags = Tags(rendered).found
    assert {tag for tag, _ in tags} <= set("h1 h2 p ul li table thead tbody tr th td img".split())
    sources = [attributes["src"] for tag, attributes in tags if tag == "img"]
    assert all(re.fullmatch(r"figures/\w+\.png", source) for source in sources)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) > 20
    for path in hostile:
        if path.suffix == ".svg":
            for element in ElementTree.parse(path).iter():
                assert element.tag.rpartition("}")[2] not in ("script", "foreignObject", "image")
                for key, value in element.attrib.items():
                    assert not key.startswith("on")
                    assert not key.endswith("href") or value.startswith("#")


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=8000",
)  # fmt: skip
WIDTHS = (1400, 400)
MEASURE = """
const results = [];
async function measure(frame) {
  const page = frame.contentDocument, root = page.documentElement;
  await Promise.allSettled([...page.images].map(image => image.decode()));
  results.push({
    width: frame.clientWidth, overflow: root.scrollWidth - root.clientWidth,
    images: page.images.length,
    loaded: [...page.images].filter(image => image.complete && image.naturalWidth > 0).length,
    requests: frame.contentWindow.performance.getEntriesByType("resource").map(e => e.name),
    scripts: page.scripts.length, pwned: window.pwned || frame.contentWindow.pwned || 0,
    boxes: [...page.querySelectorAll(".box")].map(box => box.scrollWidth - box.clientWidth),
    styled: frame.contentWindow.getComputedStyle(page.querySelector(".box")).overflowX,
    small: [...page.images].filter(image => image.clientWidth < 300).length,
  });
}
window.onload = async () => {
  for (const frame of document.querySelectorAll("iframe")) await measure(frame);
  document.getElementById("results").textContent = JSON.stringify(results);
};
"""


def measure(page, folder):
    """Open the page in frames of both widths, beside a script that looks into them."""
    frames = "".join(
        f'<iframe width="{width}" height="900" srcdoc="{html.escape(page)}"></iframe>'
        for width in WIDTHS
    )
    outer = folder / "outer.html"
    outer.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><script>{MEASURE}</script>{frames}'
        '<pre id="results">none</pre>'
    )
    command = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--dump-dom", str(outer)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<pre id="results">(.*?)</pre>', done.stdout, re.S)
    assert found and found[1] != "none", done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


def check(results):
    for seen in results:
        assert seen["overflow"] <= 0
        assert seen["images"] == seen["loaded"] >= 8 and seen["small"] == 0
        assert seen["requests"] == [] and seen["scripts"] == 0 and seen["pwned"] == 0


@needs_browser
def test_page_fits_wide_and_narrow(demo, tmp_path):
    wide, narrow = measure(named(demo[1], "report.html").read_text(), tmp_path)
    check([wide, narrow])
    # The policy lets the page's own style through: boxes scroll on a telephone, not the page.
    assert narrow["styled"] == "auto" and narrow["boxes"][0] > 0
    assert wide["boxes"] == [0] * len(wide["boxes"])


@needs_browser
@pytest.mark.parametrize("policy", [True, False])
def test_hostile_contents_neither_run_nor_load(hostile, tmp_path, policy):
    page = named(hostile, "report.html").read_text()
    if not policy:
        # The escaping must do without the policy that stands behind it.
        page, count = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
        assert count == 1
    check(measure(page, tmp_path))


@needs_browser
def test_the_measuring_itself_notices_what_is_wrong(tmp_path):
    page = (
        "<!DOCTYPE html><div class=box style='width:900px'>x</div>"
        "<img src='data:image/png;base64,AAAA'><script>parent.pwned = 1</script>"
        "<link rel=stylesheet href='http://a.test/x.css'>"
    )
    narrow = measure(page, tmp_path)[1]
    assert narrow["overflow"] > 0 and narrow["pwned"] == 1 and narrow["scripts"] == 1
    assert narrow["loaded"] < narrow["images"]

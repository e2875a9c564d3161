"""The card and the page: what they count, and that text of models stays text, by an HTML parser and in a browser."""

import html
import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import datasets
import pytest

from data.card import main as card
from data.clean import REJECTED_COLUMNS
from data.parquet import write_rows
from data.records import write_records
from data.values import Provenance, Record

ATTACKS = [
    "<script>document.title='owned'</script>",
    "</pre><script>document.title='owned'</script>",
    '"><img src=x onerror="document.title=\'owned\'">',
    "'><svg/onload=document.title='owned'>",
    "</title><body onload=document.title='owned'>",
    "<!-- --><iframe srcdoc='<script>parent.document.title=1</script>'>",
    "]]><a href=javascript:document.title='owned'>x</a>",
    "&lt;script&gt; stays as it is &amp;",
    "<style>body{display:none}</style><meta http-equiv=refresh content=0>",
    "half \ud83d a pair, a \x00 control and a \u202e reversal",
]
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


class Tags(HTMLParser):
    """What a page holds: tags, attributes, and the text between."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.texts: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data):
        self.texts.append(data)


def record(number: int, text: str = "It is 2.", pass_rate: float = 0.5, expert: str = "add") -> Record:
    messages = [{"role": "user", "content": f"{number}: {text}"}, {"role": "assistant", "content": text}]
    provenance = Provenance(
        f"p{number}", "g", 0, expert, "ab", 1, {"temperature": 1.0}, {"math_answer": "1"}, {"math_answer": 1.0}, 1.0, pass_rate,
        ("format",), "cd", 10 * number, "prompts.jsonl",
    )  # fmt: skip
    return Record(messages, provenance)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A data set of 100 rows with a report, rejected rows and a recipe."""
    made = tmp_path / "curated"
    write_records(made, lambda: [record(n, pass_rate=n / 100, expert="add" if n < 60 else "subtract") for n in range(100)])
    rejected = [_rejected(n, "refusal" if n else "cut_off", "it | ended", {"prompt": "x", "completion": "y"}) for n in range(30)]
    write_rows(made / "rejected.parquet", rejected, REJECTED_COLUMNS)
    (made / "report.json").write_text(json.dumps({"stages": [["sampled", 400], ["right", 130], ["kept", 100]]}))
    (made / "recipe.yaml").write_text("run: {name: x}\n# ``` in a comment\n")
    return made


def _rejected(number: int, reason: str, detail: str, content: dict) -> dict:
    return {"file": "f", "row": number, "id": "i", "reason": reason, "detail": detail, "content": json.dumps(content)}


def attacked(tmp_path: Path) -> Path:
    """A data set in which every text, name and number that could be is an attack."""
    made = tmp_path / "attacked"
    made.mkdir()
    rows = [
        {"messages": [{"role": text, "content": text}, {"role": "assistant", "content": text}], "expert": text, text: text, "source": text}
        for text in ATTACKS
    ]
    (made / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    clean = [text.encode(errors="replace").decode() for text in ATTACKS]
    rejected = [_rejected(n, text, text, {"prompt": ATTACKS[n], text: text}) | {"file": text} for n, text in enumerate(clean)]
    write_rows(made / "rejected.parquet", rejected, REJECTED_COLUMNS)
    (made / "report.json").write_text(json.dumps({"stages": [[text, 3] for text in clean]}))
    return made


def test_the_card_counts_stages_reasons_experts_and_tokens(folder):
    assert card([str(folder), "--licence", "prompts.jsonl=MIT"]) == 0
    text = (folder / "README.md").read_text()
    for line in (
        "| sampled | 400 |", "| kept | 100 |", "| refusal | 29 |", "| cut\\_off | 1 |", "| add | 60 |", "| subtract | 40 |",
        "| mean | 495.0 |", "| median | 500 |", "| largest | 990 |", "| sum | 49,500 |", "| prompts.jsonl | 100 | MIT |",
        "![rows by pass rate](pass_rates.svg)", "````yaml", "# ``` in a comment",
    ):  # fmt: skip
        assert line in text, line


def test_the_pass_rate_picture_has_a_bar_of_ten_rows_in_each_tenth(folder):
    assert card([str(folder)]) == 0
    picture = ElementTree.parse(folder / "pass_rates.svg").getroot()
    bars = [node for node in picture.iter("{http://www.w3.org/2000/svg}rect") if node.get("width") != "100%"]
    assert [bar.get("height") for bar in bars] == ["140.0"] * 10


def test_datasets_reads_the_folder_as_it_is_and_rejected_rows_apart(folder):
    assert card([str(folder)]) == 0
    rows = datasets.load_dataset(str(folder), cache_dir=str(folder.parent / "cache"))
    assert list(rows) == ["train"] and rows["train"].num_rows == 100
    rejected = datasets.load_dataset(str(folder), "rejected", cache_dir=str(folder.parent / "cache"))
    assert rejected["train"].num_rows == 30


def test_licences_are_kept_and_a_source_without_one_says_so(folder):
    assert card([str(folder), "--licence", "other=Apache-2.0"]) == 0
    assert card([str(folder)]) == 0
    text = (folder / "README.md").read_text()
    assert "| other | 0 | Apache-2.0 |" in text and "| prompts.jsonl | 100 | not stated |" in text


def test_rows_without_token_counts_are_counted_in_words(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"prompt": "a b", "completion": "c d e"}\n')
    assert card([str(tmp_path)]) == 0
    assert "## Words of a completion" in (tmp_path / "README.md").read_text()
    assert "| sum | 3 |" in (tmp_path / "README.md").read_text()


def test_the_page_shows_the_funnel_and_kept_beside_rejected_rows_with_each_reason(folder):
    assert card([str(folder)]) == 0
    page = Tags()
    page.feed((folder / "index.html").read_text())
    text = "\n".join(page.texts)
    for wanted in ("sampled", "400", "right", "Kept, a sample", "Rejected, a sample", "refusal: it | ended", "cut_off: it | ended"):
        assert wanted in text
    assert (folder / "index.html").read_text().count("<article class=kept>") == 20


def test_text_of_models_makes_no_tag_and_no_attribute(tmp_path, folder):
    assert card([str(folder)]) == 0
    assert card([str(attacked(tmp_path))]) == 0
    ours, theirs = Tags(), Tags()
    ours.feed((folder / "index.html").read_text())
    source = (tmp_path / "attacked" / "index.html").read_text()
    theirs.feed(source)
    assert theirs.tags <= ours.tags and theirs.attributes <= ours.attributes
    assert not {"script", "img", "iframe", "svg", "a", "object", "embed", "link"} & theirs.tags
    assert not [name for name in theirs.attributes if name.startswith("on") or name in ("src", "href", "srcdoc")]
    # Every attack can be read on the page as it was written, but for characters that cannot be shown.
    shown = "".join(theirs.texts)
    for attack in ATTACKS[:-1]:
        assert attack in shown
    assert "half \\ud83d a pair, a \\u0000 control and a \\u202e reversal" in shown
    assert html.escape(ATTACKS[0]) in source


def in_browser(page: Path, profile: Path) -> str:
    """The page as a browser has it after its scripts have run; skips where there is none."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    quiet = ["--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    flags = ["--headless", "--no-sandbox", "--disable-gpu", *quiet, "--virtual-time-budget=2000", f"--user-data-dir={profile}"]
    done = subprocess.run([browser, *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def test_nothing_of_it_runs_in_a_browser_and_all_of_it_is_shown(tmp_path):
    bare = tmp_path / "bare.html"  # shows that this browser would run them
    bare.write_text(f"<html><head><title>bare</title></head><body>{ATTACKS[0]}</body></html>")
    assert "<title>owned</title>" in in_browser(bare, tmp_path / "profile")

    folder = attacked(tmp_path)
    assert card([str(folder)]) == 0
    dom = in_browser(folder / "index.html", tmp_path / "profile")
    seen = Tags()
    seen.feed(dom)
    assert "<title>attacked</title>" in dom
    assert not {"script", "img", "iframe", "svg", "a"} & seen.tags and not [name for name in seen.attributes if name.startswith("on")]
    shown = "".join(seen.texts)
    for wanted in ("Funnel", "Rejected, by reason", "Kept, a sample", "Rejected, a sample", *ATTACKS[:-1]):
        assert wanted in shown
    for kind in ("kept", "rejected"):
        assert dom.count(f'class="{kind}"') == len(ATTACKS)


def test_a_folder_without_rows_or_with_a_broken_report_is_one_line(tmp_path, capsys):
    assert card([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"{tmp_path}: no data set; there is neither train.parquet nor train.jsonl in it\n"
    (tmp_path / "train.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "report.json").write_text("{")
    assert card([str(tmp_path)]) == 2
    assert "report.json: not valid JSON" in capsys.readouterr().err
    assert card([str(tmp_path), "--licence", "MIT"]) == 2
    assert not (tmp_path / "README.md").exists()


def test_a_readme_of_somebody_is_not_replaced(folder, capsys):
    (folder / "README.md").write_text("# mine\n")
    assert card([str(folder)]) == 2
    assert "README.md: is no card of this command, and would be lost" in capsys.readouterr().err
    assert (folder / "README.md").read_text() == "# mine\n"

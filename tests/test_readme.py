"""The README says what is so: its line numbers, its list of deviations, its files."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_line_numbers_lead_to_what_they_name():
    links = re.findall(r"\[`([\w.]+)`\]\((\w+/\w+\.py)#L(\d+)\)", README)
    assert len(links) > 20
    for name, file, line in links:
        text = (ROOT / file).read_text(encoding="utf-8").splitlines()[int(line) - 1]
        assert re.search(rf"(def|class) {name.split('.')[-1]}\b", text), f"{file}:{line} is not {name}, but: {text}"


def test_every_deviation_is_listed():
    marks = {path.relative_to(ROOT).as_posix(): len(re.findall(r"(?m)(# |^)mini:", path.read_text(encoding="utf-8")))
             for path in sorted((ROOT / "mini_dalle2").glob("*.py"))}
    listed = {f"mini_dalle2/{file}": int(count) for file, count in re.findall(r"\| `(\w+\.py)` \| (\d+) \|", README)}
    assert listed == {file: count for file, count in marks.items() if count}


def test_links_to_files_are_not_dead():
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", README):
        assert (ROOT / target).exists(), target


def test_two_setup_commands_each_on_one_line():
    setups = [line for line in README.splitlines() if line.startswith("pip install -r requirements.txt")]
    assert len(setups) == 2 and setups[0].endswith("python train.py") and setups[1].endswith("python -m pytest")

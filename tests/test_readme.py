"""The README says what is so: its line numbers, its list of deviations, its files, its commands; and no part of the paper is left out of the map."""

import ast
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from conftest import commands
from deviations import deviations, updated
from mini_dalle2 import configs
from mini_dalle2.metrics.grader import ASPECTS
from mini_dalle2.configs import MODELS
from mini_dalle2.training import overrides

from conftest import ROOT
MAP = ROOT / "notebooks" / "paper_to_code.md"
PAGES = {page.name: page for page in (ROOT / "README.md", MAP)}
README, MAPPED = (page.read_text(encoding="utf-8") for page in PAGES.values())
pages = pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)


def is_home(line, name):
    """Whether a name is made in this line of code: as a function, a class, a variable, a field or a buffer."""
    return bool(re.search(rf'\b(def|class) {name}\b|^\s*(self\.)?{name}(: [\w.\[\], |]+)? = |buffer\("{name}"', line))


@pages
def test_line_numbers_lead_to_what_they_name(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\[`([\w.]+)`\]\(([\w./]+\.py)#L(\d+)\)", text)
    assert len(links) > 20 and len(links) == len(re.findall(r"#L\d", text)), "a line number stands behind [`name`](file.py#L…), and nowhere else"
    for name, file, line in links:
        lines = (page.parent / file).read_text(encoding="utf-8").splitlines()
        there = [i for i, code in enumerate(lines, 1) if is_home(code, name.split(".")[-1])]
        assert int(line) in there, f"{file}:{line} is not {name}, which is made in line {there}"


def test_home():
    assert is_home("def guide(cond, null):", "guide") and is_home("class Codes(nn.Module):", "Codes") and is_home("    Z_TOKENS = 4", "Z_TOKENS")
    assert is_home("    z_drop: float = 0.1              # §2.1", "z_drop") and is_home('        buffer("betas", betas)', "betas")
    assert is_home("        self.logit_scale = nn.Parameter(x)", "logit_scale") and is_home("    steps: int | None = None", "steps")
    assert not is_home("    x = guide(cond, null)", "guide") and not is_home("def guided(x):", "guide") and not is_home("if x == betas:", "betas")


def test_every_deviation_is_listed():
    for path in (ROOT / "mini_dalle2").glob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert len(deviations(source)) == len(re.findall(r"(?m)(# |^)mini:", source)), f"{path.name}: a mark that is not read"
    assert updated() == README, "python tests/deviations.py"


def test_deviations_are_read_from_comments():
    source = """size: int = 2     # mini: twos, not threes
other: int = 3
# mini: a long
# reason. And more
# mini: a second
x = 1             # not this
    # nor this
"""
    assert deviations(source) == ["`size`: twos, not threes", "a long reason. And more", "a second"]


def test_every_file_is_in_the_reading_order():
    order = README[README.index("What each file teaches"):README.index("## More to do with it")]
    files = {path.name for folder, kind in (("mini_dalle2", "[!_]*.py"), ("notebooks", "*.ipynb")) for path in (ROOT / folder).glob(kind)}
    assert files == {target.rpartition("/")[2] for target in re.findall(r"\]\(([^)#]+)\)", order)}


@pages
def test_links_to_files_are_not_dead(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pages
def test_links_to_headings_are_not_dead(page):
    for target, heading in re.findall(r"\]\(([^)#:]*)#([a-z][^)]*)\)", page.read_text(encoding="utf-8")):
        text = (page.parent / target if target else page).read_text(encoding="utf-8")
        headings = [re.sub(r"[^\w\- ]", "", line.lstrip("#").strip().lower()).replace(" ", "-") for line in text.splitlines() if line.startswith("#")]
        assert heading in headings, heading


def test_pictures_can_be_seen():
    shown = re.findall(r"!\[([^]]*)\]\(([^)]+)\)", README)
    assert shown
    for text, file in shown:
        assert text, f"{file} has no description"
        with Image.open(ROOT / file) as image:
            image.load()


def test_two_setup_commands_each_on_one_line():
    setups = [line for line in README.splitlines() if line.startswith("pip install -r requirements.txt")]
    assert len(setups) == 2 and setups[0].endswith("python train.py") and setups[1].endswith("python -m pytest")


# ---------------------------------------------------------------------------------------------------------------- commands

COMMANDS = commands(README)


def check(words):
    """Raises AssertionError or ValueError unless a command names files and flags that there are."""
    if words[0] == "torchrun":                                             # its own flags, perhaps "--", then a script, or "-m" and a module
        script = next(i for i, word in enumerate(words) if word.endswith(".py") or word.startswith("mini_dalle2."))
        assert all(word.startswith("--nproc_per_node=") or word in ("-m", "--") for word in words[1:script]), words
        words = ["python", *["-m"] * ("-m" in words[:script]), *words[script:]]
    if words[0] == "pip":
        assert words[1] == "install"
        for file in [words[i + 1] for i, word in enumerate(words) if word == "-r"]:
            assert (ROOT / file).is_file(), file
        return
    assert words[0] == "python", words
    if words[1:3] == ["-m", "pytest"]:
        return
    if words[1] == "-m":
        file, argv = ROOT / (words[2].replace(".", "/") + ".py"), words[3:]
    else:
        file, argv = ROOT / words[1], words[2:]
    assert file.is_file(), file
    if file.parent == ROOT:                                                # train.py, sample.py: their own parsers
        args = importlib.import_module(file.stem).parse(argv)
        if file.stem == "train":
            overrides.override(configs.preset(args.preset or "tiny"), args.settings)
    elif file.stem == "configs":
        configs.preset(*argv)
    elif argv[:1] == ["emoji"]:                                            # data.py hands the rest to emoji.py
        file = file.with_name("emoji.py")
    for flag in [word.split("=")[0] for word in argv if re.fullmatch(r"--\w+(=.*)?", word)] if file.parent != ROOT else []:
        assert f'"{flag}"' in file.read_text(encoding="utf-8"), f"{file.name} has no {flag}"


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_can_be_read(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check(words)


@pytest.mark.parametrize("line", ["python train.py --reset tiny", "python train.py --decoder.setps=3", "python sample.py text", "python sample.py draw x",
                                  "python nowhere.py", "python -m mini_dalle2.configs papre", "python tests/benchmarks/kills.py --sparks 3",
                                  "torchrun --nprocs=2 train.py", "torchrun -m -- mini_dalle2.nowhere", "pip install -r nowhere.txt", "make all"])
def test_wrong_commands_are_found(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((AssertionError, ValueError, SystemExit)):
        check(shlex.split(line))


def test_there_are_commands():
    assert len(COMMANDS) > 20 and commands("```bash\na b && c  # d\n\ne \\\n  f\n```") == [["a", "b"], ["c"], ["e", "f"]]


def test_figures_of_the_box():
    """What the README says of the weights in the box is what their card says: the commands, and what came out all right."""
    card = (ROOT / "mini_dalle2" / "weights" / "README.md").read_text(encoding="utf-8")
    made = commands(card)
    assert made and all(words[:2] == ["python", "train.py"] and words in COMMANDS for words in made)
    figures = [re.findall(r"([\d.]+)%", row) for row in re.findall(r"\| (?:val|held_out): .*", card)]
    tables = [[re.findall(r"([\d.]+) %", row) for row in re.findall(r"\| `(?:val|held_out)` .*", part)] for part in README.split("\n\n")]
    assert len(figures) >= 6 and figures in tables and {len(row) for row in figures} == {4}
    assert f"right on {float(figures[3][0]):.0f} % of captions" in " ".join(README.split())


def test_half_an_hour():
    """The tables of what to expect are those of half_an_hour.json: what train.py printed at its end, and the grade.json of that run."""
    record = json.loads((ROOT / "tests" / "half_an_hour.json").read_text(encoding="utf-8"))
    part = README.split("### What to expect", 1)[1].split("\n### ", 1)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("| ")]
    stages = {row[0]: row[1:4] for row in rows if row[0] in MODELS}
    assert stages == {stage: [f"{s['steps']:,}", f"{s['minutes']:.1f}", f"{s['loss']:.4f}"] for stage, s in record["stages"].items()}
    tiny = configs.preset("tiny")
    assert {stage: s["steps"] for stage, s in record["stages"].items()} == {stage: getattr(tiny, stage).train.steps for stage in MODELS}
    together = sum(s["minutes"] for s in record["stages"].values())
    assert abs(together - record["minutes"]) < 0.3 and next(row for row in rows if row[0] == "together")[2] == f"{record['minutes']:.1f}"
    graded = []
    for name, row in record["grade"].items():
        if isinstance(row, dict):                                          # "val: whole chain, up1 (128 px)"; the other is CLIP's
            split, way, size = re.fullmatch(r"(\w+): ([\w ]+), \w+(?: \((.*)\))?", name).groups()
            graded.append([f"`{split}`", way, size or "32 px", *(f"{row[aspect]:.1%}".replace("%", " %") for aspect in ASPECTS)])
    assert [row for row in rows if row[0] in ("`val`", "`held_out`")][:len(graded)] == graded and len(graded) == 12
    assert f"for {record['grade']['val retrieval']:.1%}".replace("%", " %") in next(row for row in rows if row[0] == "clip")[4]


def test_python_can_be_read():
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)


# ---------------------------------------------------------------------------------------------------------------- glossary, and map of the paper

def test_glossary():
    table = README.split("## Glossary", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| (\[`[\w.]+`\]\(mini_dalle2/\w+\.py#L\d+\)) \|$", table, re.M)
    terms = [term for term, _, _ in rows]
    assert len(terms) >= 30 and terms == list(dict.fromkeys(terms)) and len(rows) == table.count("#L")


@pytest.mark.parametrize("package, column", [("dalle2_pytorch", 2), ("diffusers", 4)])
def test_other_projects_have_what_is_said_of_them(package, column):
    """The names in their columns stand in their code. DALLE2-pytorch is none of the tests' packages, so that it is looked at only where it is."""
    if not (found := importlib.util.find_spec(package)):
        pytest.skip(f"{package} is not installed")
    table = README.split("## Beside other public projects", 1)[1].split("\n## ", 1)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")][2:]
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row[column])]
    code = "\n".join(file.read_text(encoding="utf-8") for file in Path(found.submodule_search_locations[0]).rglob("*.py"))
    assert len(rows) > 10 and all(len(row) == 5 for row in rows) and len(names) > 3
    assert [name for name in names if not re.search(rf"\b{name}\b", code)] == []
    assert column != 2 or not re.search(r"analytic|slerp|\binvert|autoregressive prior", code)                # its "–"


# What the paper has, as far as this project goes by it, and the methods that it rests on.
SECTIONS = "§2, §2.1, §2.2, §3, §3.1, §3.2, §3.3, §4, §5.1, §5.2, §5.3, §5.4, §5.5, §7, App. A, App. B, App. C".split(", ")
FIGURES = [f"Fig. {i}" for i in (2, 4, 6, 7, 8, 9, 10, 11, 13, 14, 15, 16, 17)] + ["Table 1", "Table 2", "Table 3"]
EQUATIONS = ["L_prior", "CLIP's loss", "SAM", "attention", "sinusoids", "AdaGN", "linear and cosine schedule", "forward process", "posterior", "x_0, ε and v",
             "learned range", "L_simple, L_vlb, L_hybrid", "discretised Gaussian", "Gaussian KL", "importance sampling of t", "strided sampling", "ancestral step",
             "DDIM", "DDIM inversion", "analytic variance", "classifier-free guidance", "CLIP guidance", "slerp", "text difference", "blur and BSR",
             "27 steps by hand", "Fréchet distance", "precision and recall"]


def test_nothing_of_the_paper_is_left_out():
    rows = [re.split(r" (?<!\\)\| ", line.strip("| \n")) for line in MAPPED.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if row != ["in the paper", "what", "here"]]
    assert [row[0] for row in rows] == SECTIONS + FIGURES + EQUATIONS
    for name, what, here in rows:
        assert what.strip(), name
        assert re.match(r"\[.+\]\(.+\)", here) or re.fullmatch(r"Not here[:,] ?.+\.|Not here but .+\.", here), f"{name}: neither a link nor a sentence: {here}"

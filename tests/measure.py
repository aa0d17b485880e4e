"""How plain is the house? Each figure of the table that the project has set itself, measured.

    python tests/measure.py

test_measure.py asserts the limits. A newcomer reads the figures as: what must I hold in my head
at once? Lines are counted with blank ones, parameters without `self`.
"""

import ast
import contextlib
import dataclasses
import io
import re
import statistics
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch

from conftest import ROOT, SMALL
from test_graph import COMPONENTS, TOGETHER, read_sources
from test_readme import sentences

from mini_dalle2.decoder import DecoderConfig

SCRIPTS = ("train.py", "sample.py")
# A name that many rooms once had, each for something of its own.
SHARED_NAMES = ("fit", "draw", "Draw", "embed", "key", "fitting", "wrap", "mean")
LONG_FILE = 330
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


# ------------------------------------------------------------------------------ what there is

def sources():
    """Return {file: source} of the package and the scripts, the file relative to the top."""
    paths = [*sorted((ROOT / "mini_dalle2").rglob("*.py")), *(ROOT / name for name in SCRIPTS)]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def sources_of_tests():
    """Return {file: source} of the tests."""
    paths = sorted((ROOT / "tests").rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def definitions(files, kinds):
    """Yield (file, dotted name, node) of all functions or classes in {file: source}."""
    def inside(node, names):
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, (*FUNCTIONS, ast.ClassDef))
            path = [*names, child.name] if named else names
            if isinstance(child, kinds):
                yield ".".join(path), child
            yield from inside(child, path)

    for file, source in files.items():
        for name, node in inside(ast.parse(source), []):
            yield file, name, node


def length(node):
    """Count the lines of a function or class, without its decorators."""
    return node.end_lineno - node.lineno + 1


# ------------------------------------------------------------------------------ the figures

def modules_on_top():
    """List the modules in the package's top folder, without `__init__`."""
    return [name for name in read_sources()
            if (ROOT / "mini_dalle2" / f"{name}.py").is_file() and name != "__init__"]


def frames_to_backward():
    """List the functions that stand between train.py's script and `loss.backward()`.

    One stage of the preset micro begins in a temporary folder, and stops at its first backward.
    """
    import train
    names = []

    class Reached(BaseException):
        pass

    def backward(self, *args, **options):
        frame = sys._getframe(1)
        while frame.f_code is not start.__code__:
            names.append(frame.f_code.co_name)
            frame = frame.f_back
        raise Reached

    def start(folder):
        silence = io.StringIO()
        with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
            train.main([*SMALL, f"--out={Path(folder, 'run')}"])

    with tempfile.TemporaryDirectory() as folder:
        with mock.patch.object(torch.Tensor, "backward", backward), contextlib.suppress(Reached):
            start(folder)
    return names[::-1]


def widths(files):
    """Return (90th percentile of the width, share of lines over 100 columns) of {file: source}."""
    found = sorted(len(line) for source in files.values() for line in source.splitlines() if line)
    return found[int(0.9 * len(found))], sum(width > 100 for width in found) / len(found)


def parameters(node):
    """Count the parameters of a function, without self and cls."""
    names = [one.arg for one in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]]
    names += [one.arg for one in (node.args.vararg, node.args.kwarg) if one]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def is_public_verb(name):
    """Tell whether a function is a public method of DALLE2, such as `DALLE2.text_to_image`.

    Decoder.sample, through which all these verbs go, counts as one too.
    """
    owner, _, method = name.partition(".")
    public = owner in ("DALLE2", "Latents") and not method.startswith("_")
    return public or name == "Decoder.sample"


def most_parameters(files):
    """Return (number, file, name) of the function with most parameters, public verbs aside."""
    return max((parameters(node), file, name) for file, name, node in definitions(files, FUNCTIONS)
               if not is_public_verb(name))


def longest(files, kinds, n=1):
    """Return the n longest functions or classes: list of (lines, file, name)."""
    found = [(length(node), file, name) for file, name, node in definitions(files, kinds)]
    return sorted(found, reverse=True)[:n]


def owners(files, name):
    """List where a name is the name of a function or class: "file: dotted name"."""
    return [f"{file}: {path}" for file, path, node in
            definitions(files, (*FUNCTIONS, ast.ClassDef)) if node.name == name]


def long_files(files):
    """List (lines, file) of the files with more than 330 lines that are not blank."""
    found = [(sum(bool(line.strip()) for line in source.splitlines()), file)
             for file, source in files.items()]
    return sorted((one for one in found if one[0] > LONG_FILE), reverse=True)


def readme():
    """Return README's size; the last figure is in words."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return {
        "lines": len(text.splitlines()),
        "bytes": len(text.encode()),
        "line links": len(re.findall(r"#L\d", text)),
        "median sentence": statistics.median(len(one.split()) for one in sentences(text))}


def main():
    """Print all figures, each with the limit that the project has set itself."""
    files = sources()
    top = modules_on_top()
    strangers = set(top) - {*COMPONENTS, *TOGETHER}
    frames = frames_to_backward()
    width, wide = widths(files)
    test_width, test_wide = widths(sources_of_tests())
    page = readme()
    lines = {name: len(files[name].splitlines()) for name in SCRIPTS}
    count, file, name = most_parameters(files)
    (class_lines, class_file, class_name), = longest(files, ast.ClassDef)

    def row(what, found, limit=""):
        print(f"{what:<44} {found}" + (f"     (to reach: {limit})" if limit else ""))

    row("modules in the package's top folder", len(top), "at most 15, all of them the paper")
    row("  of these neither a component nor configs", ", ".join(sorted(strangers)) or "none")
    row("frames from train.py to loss.backward()", f"{len(frames)}: {' > '.join(frames)}", "4")
    row("lines of train.py / sample.py", f"{lines['train.py']} / {lines['sample.py']}", "200 / 180")
    row("width, 90th percentile; lines over 100", f"{width}; {wide:.1%}", "100; 2 %")
    row("  in tests", f"{test_width}; {test_wide:.1%}")
    row("most parameters of a function", f"{count}: {file}: {name}", "8, public verbs aside")
    row("fields of DecoderConfig", len(dataclasses.fields(DecoderConfig)), "28")
    row("longest class", f"{class_lines}: {class_file}: {class_name}", "300")
    row("README: lines, bytes", f"{page['lines']}, {page['bytes']:,}", "250, 18,000")
    row("README: links with line numbers", page["line links"], "0")
    row("README: median sentence, words", page["median sentence"], "20")
    print("\nnames that several rooms share")
    for name in SHARED_NAMES:
        row(f"  {name}", "; ".join(owners(files, name)) or "nobody")
    print("\nlongest functions")
    for found in longest(files, FUNCTIONS, 8):
        row(f"  {found[0]} lines", f"{found[1]}: {found[2]}")
    print(f"\nfiles over {LONG_FILE} lines that are not blank")
    for found in long_files(files):
        row(f"  {found[0]} lines", found[1])


if __name__ == "__main__":
    main()

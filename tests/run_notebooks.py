"""Executes the notebooks from top to bottom, each in a fresh kernel, and writes their outputs into them.

    python tests/run_notebooks.py               all of them
    python tests/run_notebooks.py 03 04         those whose names begin so
    python tests/run_notebooks.py --check       changes nothing; says where outputs are no longer of the kind that is committed

What changes with every execution although nothing has changed (times, versions, a machine's paths) is not kept. `test_notebooks.py` uses the
same functions: `python -m pytest tests/test_notebooks.py --notebooks` is `--check` as tests.
"""

import argparse
import itertools
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
CELL_SECONDS = 300                                                         # no cell may hang for longer


def find(names=()):
    """The notebooks whose names begin with one of `names`, or all, in order. Raises ValueError for a name that none has."""
    found = sorted(FOLDER.glob("[0-9]*.ipynb"))
    for name in names:
        if not any(path.name.startswith(name) for path in found):
            raise ValueError(f"there is no notebook {name}: there are {', '.join(path.stem for path in found)}")
    return [path for path in found if not names or path.name.startswith(tuple(names))]


def read(path):
    """The notebook in a file."""
    return nbformat.read(path, as_version=4)


def execute(notebook):
    """Runs a copy of it in a fresh kernel, in the folder of the notebooks: (the copy with its outputs, seconds). Raises CellExecutionError."""
    notebook, start = nbformat.from_dict(notebook), time.perf_counter()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = NotebookClient(notebook, timeout=CELL_SECONDS, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}},
                            record_timing=False)
    client.execute()
    return stripped(notebook), time.perf_counter() - start


def stripped(notebook):
    """A copy without what tells of the machine or the day: metadata but for the kernel's and language's names, and what cells say of folding."""
    notebook = nbformat.from_dict(notebook)
    notebook.metadata = nbformat.from_dict({
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}, "language_info": {"name": "python"}})
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({key: value for key, value in cell.metadata.items() if key in ("tags", "jupyter")})
        outputs = cell.get("outputs", [])
        for output in outputs:
            if "metadata" in output:
                output.metadata = nbformat.from_dict({})
        cell.update({"outputs": merged(outputs)} if cell.cell_type == "code" else {})
    return notebook


def merged(outputs):
    """Pieces of text that follow each other on one stream as one: where they are cut depends on the moment."""
    found = []
    for name, group in itertools.groupby(outputs, lambda output: output.get("name")):
        group = list(group)
        if name is not None:                                               # only streams have one
            group[0].text = "".join(output.text for output in group)
            group = group[:1]
        found += group
    return found


def kinds(cell):
    """What a code cell has put out, in kind: ("stream stdout", "display_data image/png text/plain", …). Warnings, on stderr, are not counted."""
    return tuple(" ".join([output.output_type, *([output.name] if "name" in output else sorted(output.get("data", {})))])
                 for output in merged(nbformat.from_dict(cell.outputs)) if output.get("name") != "stderr")


def differences(before, after):
    """Where the outputs of two notebooks are not of the same kind: list of sentences."""
    cells = [[cell for cell in notebook.cells if cell.cell_type == "code"] for notebook in (before, after)]
    return [f"code cell {i} gave {', '.join(kinds(old)) or 'nothing'}, and now gives {', '.join(kinds(new)) or 'nothing'}"
            for i, (old, new) in enumerate(zip(*cells), 1) if kinds(old) != kinds(new)]


def main(argv=None):
    """The command: 0 when all went well, 1 when a notebook failed or differs, 2 after a mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="the beginning of a notebook's name, such as 03")
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    args = parser.parse_args(argv)
    try:
        paths = find(args.names)
    except ValueError as error:
        print(f"run_notebooks: {error}", file=sys.stderr)
        return 2
    failed, total = 0, 0.0
    for path in paths:
        before = read(path)
        try:
            after, seconds = execute(before)
        except CellExecutionError as error:
            print(f"{path.stem}: {error}", file=sys.stderr)
            failed += 1
            continue
        total += seconds
        changes = differences(before, after) if args.check else []
        if not args.check:
            nbformat.write(after, path)
        print("\n".join([f"{path.stem}: {seconds:.1f} s, {path.stat().st_size / 1e6:.2f} MB", *changes]), flush=True)
        failed += bool(changes)
    print(f"together: {total:.1f} s")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())

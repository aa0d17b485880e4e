"""Execute the notebooks from top to bottom, each in a fresh kernel, and store their outputs.

    python tests/run_notebooks.py               all notebooks
    python tests/run_notebooks.py 03 04         the notebooks whose names begin like this
    python tests/run_notebooks.py --check       write nothing; report outputs of another kind

The stored file leaves out what changes with every execution: times, versions, paths of a machine.
`test_notebooks.py` uses the same functions: `python -m pytest tests/test_notebooks.py --notebooks`
is `--check` as tests.
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
# A cell that runs for longer than this fails.
CELL_SECONDS = 300
METADATA = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"}}


def find(names=()):
    """List the notebooks whose names begin with one of `names`, or all of them, in order.

    Raises ValueError for a name without a notebook.
    """
    found = sorted(FOLDER.glob("[0-9]*.ipynb"))
    for name in names:
        if not any(path.name.startswith(name) for path in found):
            known = ", ".join(path.stem for path in found)
            raise ValueError(f"there is no notebook {name}: choose from {known}")
    return [path for path in found if not names or path.name.startswith(tuple(names))]


def read(path):
    """Read the notebook in a file."""
    return nbformat.read(path, as_version=4)


def execute(notebook):
    """Run a copy of a notebook in a fresh kernel, in the folder of the notebooks.

    Returns the copy with its outputs, and the seconds. Raises CellExecutionError.
    """
    notebook, start = nbformat.from_dict(notebook), time.perf_counter()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = NotebookClient(notebook, timeout=CELL_SECONDS, kernel_name="python3",
                            resources={"metadata": {"path": str(FOLDER)}}, record_timing=False)
    client.execute()
    return stripped(notebook), time.perf_counter() - start


def stripped(notebook):
    """Copy a notebook without the metadata that depends on the machine or the day.

    The names of kernel and language stay, and so do the tags of cells and their folding.
    """
    notebook = nbformat.from_dict(notebook)
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        kept = {key: value for key, value in cell.metadata.items() if key in ("tags", "jupyter")}
        cell.metadata = nbformat.from_dict(kept)
        outputs = cell.get("outputs", [])
        for output in outputs:
            if "metadata" in output:
                output.metadata = nbformat.from_dict({})
        if cell.cell_type == "code":
            cell.outputs = merged(outputs)
    return notebook


def merged(outputs):
    """Join neighbouring pieces of text on one stream, because timing decides where they are cut."""
    found = []
    for name, group in itertools.groupby(outputs, lambda output: output.get("name")):
        group = list(group)
        # Only streams have a name.
        if name is not None:
            group[0].text = "".join(output.text for output in group)
            group = group[:1]
        found += group
    return found


def kinds(cell):
    """Name the kinds of outputs of a code cell.

    An example is ("stream stdout", "display_data image/png text/plain"). Warnings on stderr do not
    count.
    """
    found = []
    for output in merged(nbformat.from_dict(cell.outputs)):
        if output.get("name") == "stderr":
            continue
        parts = [output.name] if "name" in output else sorted(output.get("data", {}))
        found.append(" ".join([output.output_type, *parts]))
    return tuple(found)


def differences(before, after):
    """List, as sentences, the code cells of two notebooks with outputs of other kinds."""
    cells = [[cell for cell in notebook.cells if cell.cell_type == "code"]
             for notebook in (before, after)]
    found = []
    for i, (old, new) in enumerate(zip(*cells), 1):
        if kinds(old) != kinds(new):
            was, now = (", ".join(kinds(cell)) or "nothing" for cell in (old, new))
            found.append(f"code cell {i} gave {was}, and now gives {now}")
    return found


def main(argv=None):
    """Run the command. Returns 0 for success, 1 if a notebook failed or differs, 2 for misuse."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME",
                        help="the beginning of a notebook's name, such as 03")
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
        size = path.stat().st_size / 1e6
        print("\n".join([f"{path.stem}: {seconds:.1f} s, {size:.2f} MB", *changes]), flush=True)
        failed += bool(changes)
    print(f"together: {total:.1f} s")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())

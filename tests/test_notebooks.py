"""The notebooks: each is built alike, its outputs are there and show what they should, and (with --notebooks) it runs from top to bottom.

How a notebook is built:
- Its first cell is text: a title, and the paragraphs "**Question.** …", "**Paper.** …" (with the section, §) and "**Code.** …" (with links).
- Three cells of text at least hold "**Predict.**": a question before the cell that answers it; the answer follows, in <details>.
- Three cells at least have a heading "Exercise 1", "2", …: what to do; the next cell of code begins with "# Solution" and asserts that it is right.
- Cells that draw end with plt.show(), or call look.pictures.
"""

import ast
import base64
import io
import re

import pytest
from PIL import Image

from run_notebooks import FOLDER, differences, execute, find, kinds, merged, read, stripped

SIZE, SECONDS = 1_500_000, 120                                             # bytes, and what a notebook may take on two cores
NOTEBOOKS = find()
every = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code(notebook):
    """Its cells of code."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def images(cell):
    """The PNG files that a cell has put out, opened."""
    found = [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
    return [Image.open(io.BytesIO(base64.b64decode(text))) for text in found]


def draws(cell):
    """Whether a cell of code should have put out a picture."""
    return bool(re.search(r"^ *(plt\.show\(\)|pictures\()", cell.source, re.M))


def assert_pictures(notebook):
    """Every cell that draws has drawn something, opaque, and without a word about the machine in the file."""
    drawn = 0
    for i, cell in enumerate(code(notebook), 1):
        assert images(cell) or not draws(cell), f"code cell {i} shows no picture"
        for image in images(cell):
            assert min(image.size) >= 60 and len(image.convert("RGB").getcolors(1 << 24)) > 2, f"a picture of code cell {i} is empty"
            assert image.convert("RGBA").getextrema()[3] == (255, 255), f"a picture of code cell {i} is transparent"
            assert not re.search(MACHINE, str(image.info)), f"a picture of code cell {i} names a folder of some machine"
            drawn += 1
    assert drawn, "there is not a single picture in it"


MACHINE = r"(?<![\w.])/(home|root|tmp|work|opt|usr|Users|mnt|content|workspace)/\w|(?<!\w)[A-Za-z]:\\\\?\w|object at 0x| at 0x[0-9a-f]{6}"


def test_they_are_numbered_without_a_gap():
    assert [path.name[:3] for path in NOTEBOOKS] == [f"{i:02}_" for i in range(len(NOTEBOOKS))] and NOTEBOOKS


@every
def test_opening(path):
    first = read(path).cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    assert re.search(r"\*\*Question\.\*\* .+\?", first.source), "the question it answers"
    assert re.search(r"\*\*Paper\.\*\* .*§", first.source), "the paper's section"
    assert re.search(r"\*\*Code\.\*\* .*\]\(\.\./mini_dalle2/\w+\.py", first.source), "the file it stands beside"


@every
def test_formula_questions_and_exercises(path):
    cells = read(path).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert text.count("$$") >= 2 and text.count("$$") % 2 == 0
    assert len(re.findall("<details>", text)) == len(re.findall("</details>", text)) == len(re.findall("<summary>", text))
    predictions = [i for i, cell in enumerate(cells) if cell.cell_type == "markdown" and "**Predict.**" in cell.source]
    assert len(predictions) >= 3
    for i in predictions:                                                  # question, what answers it, the answer folded
        following = cells[i + 1:i + 5]
        answer = next((j for j, cell in enumerate(following) if "<details>" in cell.source), None)
        assert answer is not None, f"no answer follows: {cells[i].source[:80]}"
        assert any(cell.cell_type == "code" for cell in following[:answer]), f"nothing is run before the answer: {cells[i].source[:80]}"
    exercises = [i for i, cell in enumerate(cells) if cell.cell_type == "markdown" and re.search(r"^#+ Exercise \d", cell.source, re.M)]
    assert len(exercises) >= 3
    for i in exercises:
        solution = next(cell.source for cell in cells[i + 1:] if cell.cell_type == "code")
        assert solution.startswith("# Solution"), f"no solution follows: {cells[i].source[:80]}"
        assert any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(solution))), f"not tested: {solution[:80]}"


@every
def test_no_model_is_defined(path):
    for cell in code(read(path)):
        for node in ast.walk(ast.parse(cell.source)):
            assert not isinstance(node, ast.ClassDef) or not any("Module" in ast.unparse(base) for base in node.bases), node.name
            assert not (isinstance(node, ast.Call) and ast.unparse(node.func).endswith("nn.Sequential"))


@every
def test_links_lead_somewhere(path):
    for cell in read(path).cells:
        if cell.cell_type == "markdown":
            for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", cell.source):
                assert (FOLDER / target).exists(), target


@every
def test_committed_outputs(path):
    notebook = read(path)
    assert path.stat().st_size < SIZE
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1)), "not executed in order"
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    assert not re.search(MACHINE, "\n".join(str(output.get("text") or output.data.get("text/plain", "")) for output in outputs))
    assert not re.search(MACHINE, "\n".join(cell.source for cell in notebook.cells))
    assert stripped(notebook) == notebook, "written by something else than run_notebooks.py"
    assert_pictures(notebook)


@every
def test_runs_from_top_to_bottom(path, request):
    """An error in a cell, a missing picture, or outputs of another kind than committed fail; so do missing weights, with what load says."""
    if not request.config.getoption("--notebooks"):
        pytest.skip("minutes: python -m pytest tests/test_notebooks.py --notebooks")
    before = read(path)
    after, seconds = execute(before)
    assert_pictures(after)
    assert not differences(before, after)
    assert seconds < SECONDS


def test_what_counts_as_a_difference():
    from nbformat.v4 import new_code_cell, new_notebook, new_output

    def notebook(*outputs):
        return new_notebook(cells=[new_code_cell("plt.show()", outputs=list(outputs))])

    def words(text):
        return new_output("stream", name="stdout", text=text)

    picture = new_output("display_data", data={"image/png": "", "text/plain": "<Figure>"})
    assert not differences(notebook(words("1.23 s")), notebook(words("4.56"), words(" s")))    # what is said may change
    assert kinds(notebook(words("a"), picture).cells[0]) == ("stream stdout", "display_data image/png text/plain")
    assert len(differences(notebook(picture), notebook())) == 1
    assert len(differences(notebook(words("")), notebook(picture))) == 1
    assert [output.text for output in merged([words("a"), words("b")])] == ["ab"]
    with pytest.raises(AssertionError, match="no picture"):
        assert_pictures(notebook(words("a")))
    assert re.search(MACHINE, "in /home/me/x.py") and re.search(MACHINE, "<A object at 0x7f>") and not re.search(MACHINE, "see ../mini_dalle2/clip.py")
    with pytest.raises(ValueError, match="no notebook nowhere"):
        find(["nowhere"])


@pytest.mark.parametrize("source, said", [("1 / 0", "ZeroDivisionError"), ("from mini_dalle2 import DALLE2; DALLE2.load('nowhere')", "no run folder nowhere")])
def test_a_failing_cell_fails(source, said, request):
    from nbclient.exceptions import CellExecutionError
    from nbformat.v4 import new_code_cell, new_notebook
    if not request.config.getoption("--notebooks"):
        pytest.skip("starts a kernel: python -m pytest tests/test_notebooks.py --notebooks")
    with pytest.raises(CellExecutionError, match=said):
        execute(new_notebook(cells=[new_code_cell("import look"), new_code_cell(source)]))

"""The notebooks: all have the same structure, and their stored outputs show what they should.

With --notebooks, each notebook also runs from top to bottom.

How a notebook is built:
- Its first cell is text. It has a title and the paragraphs "**Question.** …", "**Paper.** …" (with
  the section, §) and "**Code.** …" (with links).
- At least three cells of text contain "**Predict.**", a question before the cell that answers it.
  The answer follows in <details>.
- At least three cells have a heading "Exercise 1", "2", …. The next code cell begins with
  "# Solution" and asserts that the solution is right.
- Cells that show a picture end with plt.show() or call look.pictures.
- The prose states a percentage only if an output of the notebook shows it, or if the paragraph
  attributes it to a paper.
"""

import ast
import base64
import io
import re

import pytest
from PIL import Image

from run_notebooks import FOLDER, differences, execute, find, kinds, merged, read, stripped

# the largest size of a file in bytes
SIZE = 1_500_000
# the longest time that a notebook may take on two cores
SECONDS = 120
# what looks like a path or an address of one particular machine
MACHINE = (r"(?<![\w.])/(home|root|tmp|work|opt|usr|Users|mnt|content|workspace)/\w"
           r"|(?<!\w)[A-Za-z]:\\\\?\w|object at 0x| at 0x[0-9a-f]{6}")
PERCENTAGE = r"\d+(?:\.\d+)?(?= ?%)"

NOTEBOOKS = find()
every = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code(notebook):
    """Return the code cells of a notebook."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def prose(notebook):
    """Return the cells of text of a notebook."""
    return [cell for cell in notebook.cells if cell.cell_type == "markdown"]


def images(cell):
    """Open the PNG files in the outputs of a cell."""
    found = [output.data["image/png"] for output in cell.outputs
             if "image/png" in output.get("data", {})]
    return [Image.open(io.BytesIO(base64.b64decode(text))) for text in found]


def draws(cell):
    """Say whether a code cell should have a picture in its outputs."""
    return bool(re.search(r"^ *(plt\.show\(\)|pictures\()", cell.source, re.M))


def assert_pictures(notebook):
    """Check that each cell that should show a picture does so.

    Each picture must be opaque, and its file must not name a folder of some machine.
    """
    shown = 0
    for i, cell in enumerate(code(notebook), 1):
        assert images(cell) or not draws(cell), f"code cell {i} shows no picture"
        for image in images(cell):
            colours = image.convert("RGB").getcolors(1 << 24)
            assert min(image.size) >= 60 and len(colours) > 2, (
                f"a picture of code cell {i} is empty")
            assert image.convert("RGBA").getextrema()[3] == (255, 255), (
                f"a picture of code cell {i} is transparent")
            assert not re.search(MACHINE, str(image.info)), (
                f"a picture of code cell {i} names a folder of some machine")
            shown += 1
    assert shown, "the notebook shows no picture at all"


def unshown_percentages(notebook):
    """List the percentages in the prose that no output shows and no paper is named for.

    Exercises may name invented figures, so their text does not count.
    """
    outputs = [str(output.get("text") or "") for cell in code(notebook) for output in cell.outputs]
    shown = set(re.findall(PERCENTAGE, "\n".join(outputs)))
    found = []
    for cell in prose(notebook):
        text = re.split(r"^#+ Exercise \d", cell.source, flags=re.M)[0]
        for paragraph in re.split(r"\n\s*\n", text):
            if not re.search(r"paper|§", paragraph):
                found += [figure for figure in re.findall(PERCENTAGE, paragraph)
                          if figure not in shown]
    return found


def test_they_are_numbered_without_a_gap():
    numbers = [f"{i:02}_" for i in range(len(NOTEBOOKS))]
    assert [path.name[:3] for path in NOTEBOOKS] == numbers and NOTEBOOKS


@every
def test_opening(path):
    first = read(path).cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    assert re.search(r"\*\*Question\.\*\* .+\?", first.source), "the question it answers"
    assert re.search(r"\*\*Paper\.\*\* .*§", first.source), "the paper's section"
    assert re.search(r"\*\*Code\.\*\* .*\]\(\.\./mini_dalle2/(\w+/)?\w+\.py", first.source), (
        "the file that it explains")


@every
def test_formula_questions_and_exercises(path):
    cells = read(path).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert text.count("$$") >= 2 and text.count("$$") % 2 == 0
    counts = [len(re.findall(tag, text)) for tag in ("<details>", "</details>", "<summary>")]
    assert counts[0] == counts[1] == counts[2]

    predictions = [i for i, cell in enumerate(cells)
                   if cell.cell_type == "markdown" and "**Predict.**" in cell.source]
    assert len(predictions) >= 3
    # The question comes first, then the cell that answers it, then the folded answer.
    for i in predictions:
        question = cells[i].source[:80]
        following = cells[i + 1:i + 5]
        answer = next((j for j, cell in enumerate(following) if "<details>" in cell.source), None)
        assert answer is not None, f"no answer follows: {question}"
        assert any(cell.cell_type == "code" for cell in following[:answer]), (
            f"nothing is run before the answer: {question}")

    exercises = [i for i, cell in enumerate(cells) if cell.cell_type == "markdown"
                 and re.search(r"^#+ Exercise \d", cell.source, re.M)]
    assert len(exercises) >= 3
    for i in exercises:
        solution = next(cell.source for cell in cells[i + 1:] if cell.cell_type == "code")
        assert solution.startswith("# Solution"), f"no solution follows: {cells[i].source[:80]}"
        nodes = ast.walk(ast.parse(solution))
        assert any(isinstance(node, ast.Assert) for node in nodes), f"not tested: {solution[:80]}"


@every
def test_no_model_is_defined(path):
    for cell in code(read(path)):
        for node in ast.walk(ast.parse(cell.source)):
            bases = node.bases if isinstance(node, ast.ClassDef) else []
            assert not any("Module" in ast.unparse(base) for base in bases), ast.unparse(node)
            assert not (isinstance(node, ast.Call)
                        and ast.unparse(node.func).endswith("nn.Sequential"))


@every
def test_links_lead_somewhere(path):
    for cell in prose(read(path)):
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", cell.source):
            assert (FOLDER / target).exists(), target
        assert not re.search(r"\]\([^)]*#L\d", cell.source), "a link names a line"


@every
def test_prose_states_no_percentage_that_no_output_shows(path):
    assert not unshown_percentages(read(path))


def test_what_counts_as_an_unshown_percentage():
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

    def notebook(text):
        shown = new_output("stream", name="stdout", text="val  97% ±  4, right 8.5 %")
        return new_notebook(cells=[new_markdown_cell(text), new_code_cell("", outputs=[shown])])

    assert unshown_percentages(notebook("Of these 55 % are right, and 8.5% are not.")) == ["55"]
    assert not unshown_percentages(notebook("The accuracy is 97 %."))
    assert not unshown_percentages(notebook("The paper drops the caption in 50 % (§2.1)."))
    assert not unshown_percentages(notebook("### Exercise 1\n\nFrom 30 % to 35 %."))
    assert unshown_percentages(notebook("The paper has 50 %.\n\nOurs has 96 %.")) == ["96"]


@every
def test_committed_outputs(path):
    notebook = read(path)
    cells = code(notebook)
    assert path.stat().st_size < SIZE
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), (
        "not executed in order")
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    texts = [str(output.get("text") or output.data.get("text/plain", "")) for output in outputs]
    assert not re.search(MACHINE, "\n".join(texts))
    assert not re.search(MACHINE, "\n".join(cell.source for cell in notebook.cells))
    assert stripped(notebook) == notebook, "written by something else than run_notebooks.py"
    assert_pictures(notebook)


@every
def test_runs_from_top_to_bottom(path, request):
    """Run a notebook without errors, and get outputs of the same kinds as the stored ones.

    Missing weights fail too, with the message of DALLE2.load.
    """
    if not request.config.getoption("--notebooks"):
        pytest.skip("takes minutes: python -m pytest tests/test_notebooks.py --notebooks")
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
    # The text itself may change.
    assert not differences(notebook(words("1.23 s")), notebook(words("4.56"), words(" s")))
    assert kinds(notebook(words("a"), picture).cells[0]) == (
        "stream stdout", "display_data image/png text/plain")
    assert len(differences(notebook(picture), notebook())) == 1
    assert len(differences(notebook(words("")), notebook(picture))) == 1
    assert [output.text for output in merged([words("a"), words("b")])] == ["ab"]
    with pytest.raises(AssertionError, match="no picture"):
        assert_pictures(notebook(words("a")))
    assert re.search(MACHINE, "in /home/me/x.py") and re.search(MACHINE, "<A object at 0x7f>")
    assert not re.search(MACHINE, "see ../mini_dalle2/clip.py")
    with pytest.raises(ValueError, match="no notebook nowhere"):
        find(["nowhere"])


@pytest.mark.parametrize("source, said", [
    ("1 / 0", "ZeroDivisionError"),
    ("from mini_dalle2 import DALLE2; DALLE2.load('nowhere')", "no run folder nowhere")])
def test_a_failing_cell_fails(source, said, request):
    from nbclient.exceptions import CellExecutionError
    from nbformat.v4 import new_code_cell, new_notebook
    if not request.config.getoption("--notebooks"):
        pytest.skip("starts a kernel: python -m pytest tests/test_notebooks.py --notebooks")
    with pytest.raises(CellExecutionError, match=said):
        execute(new_notebook(cells=[new_code_cell("import look"), new_code_cell(source)]))

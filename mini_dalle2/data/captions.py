"""Where the captions of a folder of pictures are written.

    metadata.jsonl       {"file_name": "cats/tom.png", "text": "a grey cat"}     a line each
    metadata.csv         file_name,text                                          a heading first
    metadata.parquet     the same columns; needs pyarrow
    tom.txt, tom.caption, tom.json     beside tom.png: a caption on each line; {"caption": …}

Each folder may have a metadata file. Its file names begin in this folder. As in Hugging Face's
`imagefolder`, which names the columns file_name and text; other usual names are understood too.

Reference: the `imagefolder` page of the Hugging Face `datasets` documentation.
Read next: folder.py, which brings pictures and captions together.
"""

import csv
import io
import json

from ..runtime.checks import brief

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
FILE_COLUMNS = ("file_name", "image_file_name", "image", "filename", "file", "path")
TEXT_COLUMNS = ("text", "caption", "captions", "prompt", "texts", "prompts", "description")
# In this order; img2dataset writes .txt and .json.
SIDECARS = (".txt", ".caption", ".json")
# No system takes a longer path.
LONGEST_PATH = 32_767
EXAMPLE = '{"file_name": "tom.png", "text": "a grey cat"}'
NOT_UNDERSTOOD = f"line not understood; a line looks like {EXAMPLE}"
NO_COLUMN = "no fitting column"


def has_ink(text):
    """Tell whether a text has any character that can be seen."""
    return any(char.isprintable() and not char.isspace() for char in text)


def clean_texts(value):
    """Return the captions among `value` in which something can be seen, with single spaces.

    value: a caption or a list of captions, from a file. Raises TypeError for anything else.
    """
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"text is neither a string nor a list of strings: {brief(value)}")
    # JSON may hold halves of characters, which no other file can.
    texts = [text.encode("utf-8", "replace").decode() for text in texts if has_ink(text)]
    return [" ".join(text.split()) for text in texts]


def read_metadata(name, content):
    """Read a metadata file: (entries, bad).

    name: the file's name; content: its bytes. entries: [(picture's name, list of captions)].
    bad: [(place, reason, detail)] of what cannot be understood.
    """
    entries = []
    bad = []
    columns = {}
    try:
        for place, row in READERS[name.lower()](content):
            if not isinstance(row, dict):
                detail = str(row)[:80] if isinstance(row, Exception) else brief(row)
                bad.append((f"{name} {place}", NOT_UNDERSTOOD, detail))
                continue
            columns |= dict.fromkeys(row)
            try:
                entries.append(entry(row))
            except KeyError:
                bad.append((f"{name} {place}", NOT_UNDERSTOOD, "no file_name"))
            except TypeError as error:
                bad.append((f"{name} {place}", NOT_UNDERSTOOD, str(error)))
    except (ValueError, csv.Error, ImportError) as error:
        # A file that is no table at all, such as a text that is not UTF-8.
        return [], [(name, "captions cannot be read", str(error))]
    for kind, known in (("pictures' names", FILE_COLUMNS), ("captions", TEXT_COLUMNS)):
        if columns and not column(columns, known):
            found = ", ".join(map(str, columns))
            bad = [(name, NO_COLUMN, f"{kind} are looked for in {', '.join(known)}; "
                                     f"the columns are {found}")]
            break
    return entries, bad


def column(row, known):
    """Return the first of the known column names that a row has, or None."""
    return next((name for name in known if name in row), None)


def entry(row):
    """Turn a row of a table into (picture's name, captions).

    Raises KeyError without a column for the picture, TypeError for values of a wrong kind.
    """
    file = row[column(row, FILE_COLUMNS)]
    # Hugging Face writes {"bytes": …, "path": …} for a picture.
    file = file.get("path") if isinstance(file, dict) else file
    if not isinstance(file, str):
        raise TypeError(f"file_name is no text: {brief(file)}")
    if len(file) > LONGEST_PATH:
        raise TypeError(f"file_name is longer than any path: {brief(file)}")
    # A column may be empty in some rows.
    filled = (row[name] for name in TEXT_COLUMNS if row.get(name) is not None)
    return file, clean_texts(next(filled, []))


def rows_of_jsonl(content):
    """Yield (place, row) of each line that is not empty; the row may be the error."""
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                row = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                row = error
            yield f"line {number}", row


def rows_of_csv(content):
    """Yield (place, row) of each row. All cells stay text, also dates and numbers.

    Raises ValueError, csv.Error.
    """
    text = content.decode("utf-8-sig")
    heading = text.partition("\n")[0]
    # Spreadsheets of some countries write semicolons; others write tabs.
    delimiter = max(",;\t", key=heading.count)
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    for row in table:
        # More cells than headings are under None, and missing cells are None.
        more = row.pop(None, [])
        if any(cell.strip() for cell in more):
            # Its caption would end at the first comma.
            row = ValueError(f"more cells than headings: a caption with {delimiter!r} needs quotes")
        yield f"line {table.line_num}", row


def rows_of_parquet(content):
    """Yield (place, row) of each row. Raises ImportError without pyarrow, ValueError."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ImportError("reading it needs pyarrow: pip install pyarrow") from None
    try:
        rows = parquet.read_table(io.BytesIO(content)).to_pylist()
    except (pyarrow.ArrowException, OSError, ArithmeticError) as error:
        # A damaged page is an OSError, and a date that Python lacks an OverflowError.
        raise ValueError(str(error)) from None
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", row


READERS = dict(zip(METADATA, (rows_of_jsonl, rows_of_csv, rows_of_parquet)))


def read_sidecar(suffix, content):
    """Read captions from the file beside a picture: list of str.

    suffix: of the file's name; content: its bytes. A .json without captions gives none, because
    it may be about something else. Raises ValueError if a text is not UTF-8.
    """
    text = content.decode("utf-8-sig")
    if suffix != ".json":
        return clean_texts(text.splitlines())
    try:
        row = json.loads(text)
        return clean_texts(row[column(row, TEXT_COLUMNS)])
    except (ValueError, TypeError, KeyError, RecursionError):
        return []

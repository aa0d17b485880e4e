"""Grid: a sheet of pictures with their captions beneath.

Every picture grid of the project is made here, by sample.py, by train.py after a stage, by the
evaluation and by the notebooks.

    ┌─────┐ ┌─────┐
    │     │ │     │      one row: pictures side by side, small ones enlarged pixel by pixel
    └─────┘ └─────┘
    caption caption      beneath each picture, or one caption beneath the whole row

Read next: shapes.py, whose pictures most grids show.
"""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from ..runtime.files import atomic_open

# All in pixels.
GAP = 8
LEAST_SIDE = 128
LEAST_FONT = 12
FRAME = "silver"
# The file of a sheet has a text with this key, so that nobody takes the sheet for one picture.
MARK = "mini_dalle2 sheet"


def break_lines(text, width, font):
    """Break a text into lines that are at most `width` pixels wide in this font: list of str.

    A word that is wider than that gets a line of its own and stays whole.
    """
    lines = []
    for paragraph in text.split("\n"):
        lines.append("")
        for word in paragraph.split():
            longer = f"{lines[-1]} {word}".strip()
            if lines[-1] and font.getlength(longer) > width:
                lines.append(word)
            else:
                lines[-1] = longer
    return lines


def grid_font(side):
    """Load the font for pictures of `side` pixels: DejaVu Sans, whose letters include η and θ."""
    # Imported here, because only grids need matplotlib, and only for this font.
    import matplotlib
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(path, max(LEAST_FONT, side // 26))


def check_rows(rows, captions):
    """Raise ValueError unless there are pictures in each row and captions for each of the rows."""
    if not rows or not all(rows) or len(captions) != len(rows):
        raise ValueError(
            f"caption_grid got {len(rows)} rows and {len(captions)} entries of captions: "
            f"give it rows with pictures, and one entry per row")
    for row, caption in zip(rows, captions):
        if not isinstance(caption, str) and len(caption) != len(row):
            raise ValueError(
                f"caption_grid got {len(caption)} captions for a row of {len(row)} pictures: "
                f"give it one caption per row or one per picture")


def paste_centred(sheet, image, corner, side):
    """Paste a picture into the middle of a square cell of the sheet, enlarged if it is small.

    corner: (left, top) of the cell. The factor is a whole number, so that pixels stay visible. A
    thin frame around the picture shows where a white picture ends.
    """
    left, top = corner
    factor = max(1, side // max(image.size))
    larger = (image.width * factor, image.height * factor)
    big = image.convert("RGB").resize(larger, Image.Resampling.NEAREST)
    left += (side - big.width) // 2
    top += (side - big.height) // 2
    frame = (left - 1, top - 1, left + big.width, top + big.height)
    ImageDraw.Draw(sheet).rectangle(frame, outline=FRAME)
    sheet.paste(big, (left, top))


def caption_grid(rows, captions, path=None):
    """Lay out pictures with captions beneath on one sheet: RGB image, saved to `path` if given.

    rows: list of rows of PIL images. Pictures below 128 px are enlarged.
    captions: one entry per row. A str stands beneath the first picture and is as wide as the row;
    a list has a str for each picture. Raises ValueError if rows and captions do not match.
    """
    rows = [list(row) for row in rows]
    check_rows(rows, captions)
    side = max(LEAST_SIDE, max(max(image.size) for row in rows for image in row))
    columns = max(len(row) for row in rows)
    font = grid_font(side)
    line_height = sum(font.getmetrics()) + 2

    texts = []
    heights = []
    for caption in captions:
        if isinstance(caption, str):
            lines = [break_lines(caption, columns * (side + GAP) - GAP, font)]
        else:
            lines = [break_lines(one, side, font) for one in caption]
        texts.append(lines)
        heights.append(side + line_height * max(len(each) for each in lines) + GAP + 4)

    sheet = Image.new("RGB", (GAP + columns * (side + GAP), GAP + sum(heights)), "white")
    pen = ImageDraw.Draw(sheet)
    top = GAP
    for row, lines, height in zip(rows, texts, heights):
        for i, image in enumerate(row):
            paste_centred(sheet, image, (GAP + i * (side + GAP), top), side)
        for i, each in enumerate(lines):
            corner = (GAP + i * (side + GAP), top + side + 4)
            pen.multiline_text(corner, "\n".join(each), fill="black", font=font, spacing=2)
        top += height
    if path is not None:
        save_sheet(sheet, path)
    return sheet


def save_sheet(sheet, path, **options):
    """Write a sheet as PNG, atomically, with a mark that `refuse_sheet` finds.

    options: those of Pillow's save.
    """
    info = PngInfo()
    info.add_text(MARK, "pictures with captions")
    with atomic_open(path) as file:
        sheet.save(file, format="PNG", pnginfo=info, **options)


def refuse_sheet(image, path):
    """Raise ValueError if a file that was asked for as one picture is a sheet of pictures."""
    if MARK in image.info:
        raise ValueError(f"{path} is a sheet of pictures with captions: give a single picture; "
                         f"sample.py --singles writes each picture to a file of its own")

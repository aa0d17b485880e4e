"""A labelled sheet of pictures.

Read next: shapes.py.
"""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont


def wrap(draw, text, font, width):
    """Break a text into lines no wider than `width` pixels: list of str; a single long word stays whole."""
    lines = []
    for paragraph in text.split("\n"):
        lines.append("")
        for word in paragraph.split():
            longer = f"{lines[-1]} {word}".strip()
            if lines[-1] and draw.textlength(longer, font=font) > width:
                lines.append(word)
            else:
                lines[-1] = longer
    return lines


def caption_grid(rows, captions, path=None):
    """A sheet of pictures with captions beneath, saved to `path` if given: RGB image.

    rows: list of rows of PIL images; small ones are enlarged to 128 px, pixels kept visible. captions: one str per row, beneath its first
    picture and as wide as the row, or one list per row with a str for each picture. Raises ValueError if they do not match.
    """
    rows = [list(row) for row in rows]
    if not rows or not all(rows) or len(captions) != len(rows):
        raise ValueError(f"caption_grid needs rows of pictures and one caption entry per row, got {len(rows)} and {len(captions)}")
    if any(not isinstance(c, str) and len(c) != len(row) for c, row in zip(captions, rows)):
        raise ValueError("caption_grid needs one caption per row or one per picture")
    side = max(128, max(max(image.size) for row in rows for image in row))
    import matplotlib                                                      # here, because only sheets need it, for its font: Pillow's has no η and θ
    gap, font = 8, ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), max(12, side // 26))
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    line = sum(font.getmetrics()) + 2
    columns = max(map(len, rows))
    texts = [[wrap(measure, captions[i], font, columns * (side + gap) - gap)] if isinstance(captions[i], str) else
             [wrap(measure, text, font, side) for text in captions[i]] for i in range(len(rows))]
    heights = [side + line * max(map(len, row)) + gap + 4 for row in texts]
    sheet = Image.new("RGB", (gap + columns * (side + gap), gap + sum(heights)), "white")
    draw, top = ImageDraw.Draw(sheet), gap
    for row, row_texts, height in zip(rows, texts, heights):
        for i, image in enumerate(row):
            factor = max(1, side // max(image.size))
            big = image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
            sheet.paste(big, (gap + i * (side + gap) + (side - big.width) // 2, top + (side - big.height) // 2))
        for i, lines in enumerate(row_texts):
            draw.multiline_text((gap + i * (side + gap), top + side + 4), "\n".join(lines), fill="black", font=font, spacing=2)
        top += height
    if path is not None:
        sheet.save(path)
    return sheet

"""What an experiment is, and what it finds: tables of figures, claims, checks, plots, sheets.

A claim is a sentence of the paper with a difference that is above zero if the sentence holds here
too. The verdict is read off the interval of the difference (metrics.intervals.agrees); nobody
types it. A check is the same for what must hold if the code is right. Checks are listed apart.

Read next: measures.py.
"""

from typing import Callable, NamedTuple


class Experiment(NamedTuple):
    """An experiment.

    needs(lab): {name: recipe}, all that has to be made.
    find(lab, found, made): looks at {name: what the recipe made}, pictures as `Seen`, and fills
        in the Findings `found`.
    data: "shapes", "folder", or "any" pictures.
    models: the variants that it needs besides the judge.
    """
    name: str
    title: str
    needs: Callable
    find: Callable
    data: str
    models: tuple


def experiment(title, needs, data="any", models=()):
    """Turn the `find` function below into an Experiment of its name."""
    def wrapped(find):
        return Experiment(find.__name__, title, needs, find, data, models)

    return wrapped


class Findings:
    """What an experiment found, in plain values that JSON can hold."""

    def __init__(self):
        self.tables = []
        self.claims = []
        self.checks = []
        self.plots = []
        self.grids = []
        self.notes = []

    def table(self, first, columns, rows):
        """Add a table.

        first: what the rows are; columns: {name: unit}, unit "%" of a share, "" of another number;
        rows: {name: a Figure or None for each column}.
        """
        self.tables.append({"first": first, "columns": columns, "rows": rows})

    def claim(self, paper, here, difference, unit=""):
        """Add a sentence of the paper and the difference (a Figure) that is above zero if it holds.

        here: what the difference is; difference None: too few pictures to tell.
        """
        self.claims.append(statement(paper, here, difference, unit))

    def check(self, what, here, difference, unit=""):
        """Add the same for what is true by construction."""
        self.checks.append(statement(what, here, difference, unit))

    def plot(self, x, values, panels, log=False):
        """Add a plot of panels beside each other.

        x: what the x axis shows, at `values`, on a logarithmic scale if `log`;
        panels: {what the y axis shows: (unit, {line: a Figure for each value})}.
        """
        self.plots.append({"x": x, "values": values, "log": log, "panels": panels})

    def sheet(self, lab, name, rows, count=8):
        """Add a sheet with the first pictures of each set {name: Seen}, and what is wrong."""
        labels = []
        for row, seen in rows.items():
            notes = seen.notes()[:count]
            # A capital η looks like an H.
            head = row.upper() if row.isascii() else row
            labels.append([f"{head}: {notes[0]}", *notes[1:]])
        self.grids.append(lab.grid(name, [seen.images[:count] for seen in rows.values()], labels))

    def paths(self, lab, name, true, made, labels, rows):
        """Add a sheet with a row for each of some true pictures.

        true: Seen; made: {name: Seen}, one picture of each per row; labels: one for each of these;
        rows: which of the pictures.
        """
        images = [[true.images[i], *(seen.images[i] for seen in made.values())] for i in rows]
        notes = [[true.captions[i], *labels] for i in rows]
        self.grids.append(lab.grid(name, images, notes))


def statement(paper, here, difference, unit):
    """A claim or a check in plain values."""
    return {"paper": paper, "here": here, "difference": difference, "unit": unit}

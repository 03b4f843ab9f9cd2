"""What a sweep of learning rates shows: the outcomes, their table, and a picture."""

import dataclasses
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence

import rich.console
from PIL import Image, ImageDraw, ImageFont

from vit22b_transfer.host import charts, tables, whole_files

CLASSES = 24

# What is swept -> its settings of the recipe.
WITH, WITHOUT, SEQUENTIAL = "with QK-norm", "without QK-norm", "sequential, QK-norm"
FORMS: Mapping[str, Mapping[str, bool]] = {
    WITH: {"QK_NORM": True, "PARALLEL": True},
    WITHOUT: {"QK_NORM": False, "PARALLEL": True},
    SEQUENTIAL: {"QK_NORM": True, "PARALLEL": False},
}
# Told apart by people who see no red or green, too.
_COLORS = {WITH: (0, 96, 156), WITHOUT: (176, 32, 0), SEQUENTIAL: (120, 120, 120)}
_WIDTH, _HEIGHT = 320, 250


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training: a key of `FORMS`, a peak learning rate, a seed, and steps."""

    form: str
    rate: float
    seed: int
    steps: int

    @property
    def name(self) -> str:
        """Its folder's name, another one for another cell."""
        form = self.form.replace(",", "").replace(" ", "_")
        return f"{form}-{self.rate:g}-seed_{self.seed}-{self.steps}_steps"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a cell. Layers and heads: the extreme one, over the whole run.

    loss: in nats, at the end, on held-out pictures; infinite if numbers stopped being
      finite before. largest_logit: absolute, of all attentions. entropy: in nats, the
      lowest mean over the heads of a layer.
    """

    loss: float
    largest_logit: float
    entropy: float


def first_loss() -> float:
    """The loss before the first step: the head's kernel is zero, all classes alike."""
    return math.log(CLASSES)


def capped(loss: float) -> float:
    """A loss, or that before the first step if it is lower, as of one that diverged."""
    return min(loss, first_loss())


def sensitivity(losses: Mapping[float, float]) -> float:
    """How much a loss depends on the learning rate (Wortsman et al. 2023, section 2.2).

    losses: final loss by peak rate, infinite where training diverged. The mean over the
    rates of min(final loss, loss before the first step), minus the best final loss.
    """
    best = min(map(capped, losses.values()))
    return statistics.fmean(map(capped, losses.values())) - best


def by_rate(
    outcomes: Mapping[Cell, Outcome], form: str, field: str
) -> dict[float, list[float]]:
    """Rate -> the values of a field of `Outcome`, one for each seed."""
    found: dict[float, list[float]] = {}
    for cell, outcome in outcomes.items():
        if cell.form == form:
            found.setdefault(cell.rate, []).append(getattr(outcome, field))
    return dict(sorted(found.items()))


def sensitivities(outcomes: Mapping[Cell, Outcome], form: str) -> list[float]:
    """`sensitivity` of each seed."""
    by_seed: dict[int, dict[float, float]] = {}
    for cell, outcome in outcomes.items():
        if cell.form == form:
            by_seed.setdefault(cell.seed, {})[cell.rate] = outcome.loss
    return [sensitivity(losses) for losses in by_seed.values()]


def print_table(
    console: rich.console.Console, outcomes: Mapping[Cell, Outcome]
) -> None:
    """Prints a row for each rate: losses, largest logits, entropies of both forms."""
    rates = sorted({cell.rate for cell in outcomes})
    names = [f"{rate:g}" for rate in rates] + ["LR sensitivity"]
    columns = {}
    for title, form, field in _columns(outcomes):
        values = by_rate(outcomes, form, field)
        shown = [_spread(values.get(rate, [])) for rate in rates]
        last = ""
        if field == "loss" and form != SEQUENTIAL:
            last = _spread(sensitivities(outcomes, form))
        columns[title] = [*shown, last]
    seeds = len({cell.seed for cell in outcomes})
    tables.print_table(
        console,
        names,
        columns,
        heading="peak rate",
        title=f"Drawn objects, {CLASSES} classes",
        section=len(rates),
    )
    console.print(
        f"loss: held-out, in nats; {first_loss():.3f} before the first step. logit, "
        "entropy: the largest and the lowest of a layer in the whole run. "
        + (f"Means of {seeds} seeds, and their range." if seeds > 1 else "One seed."),
        highlight=False,
    )


def _columns(outcomes: Mapping[Cell, Outcome]) -> Iterator[tuple[str, str, str]]:
    for field, word in (("loss", "loss"), ("largest_logit", "logit"), ("entropy",) * 2):
        yield f"{word}, {WITH}", WITH, field
        yield f"{word}, {WITHOUT}", WITHOUT, field
    if any(cell.form == SEQUENTIAL for cell in outcomes):
        yield f"loss, {SEQUENTIAL}", SEQUENTIAL, "loss"


def _spread(values: Sequence[float]) -> str:
    """The mean, and behind it the range, if there are several."""
    if not values:
        return ""
    if math.inf in values:
        return f"diverged ({values.count(math.inf)} of {len(values)})"
    text = _number(statistics.fmean(values))
    if len(values) > 1:
        text += f" ({_number(min(values))} to {_number(max(values))})"
    return text


def _number(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:,.0f}"


def draw(outcomes: Mapping[Cell, Outcome], path: str) -> None:
    """Writes a PNG: losses, largest logits and entropies against the learning rate.

    A line goes through the means of the seeds, and each of them has a dot. A loss is at
    most that before the first step. Not drawn: logits and entropies that nothing told.
    """
    panels = {
        "loss": ("held-out loss (nats)", False),
        "largest_logit": ("largest |attention logit|", True),
        "entropy": ("lowest attention entropy (nats)", False),
    }
    image = Image.new("RGB", (_WIDTH * len(panels), _HEIGHT + 24), charts.WHITE)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default()
    for number, (field, (title, is_log)) in enumerate(panels.items()):
        lines = []
        for form, color in _COLORS.items():
            points, dots = [], []
            for rate, values in by_rate(outcomes, form, field).items():
                if field == "loss":
                    values = [capped(value) for value in values]
                values = [value for value in values if math.isfinite(value)]
                if values:
                    points.append((rate, statistics.fmean(values)))
                dots += [charts.Line([(rate, value)], color, 2) for value in values]
            lines += [charts.Line(points, color), *dots]
        box = (number * _WIDTH, 24, _WIDTH, _HEIGHT)
        labels = title, "by peak learning rate"
        charts.draw_panel(pen, font, box, labels, lines, log_x=True, log_y=is_log)
    x = 8
    for form, color in _COLORS.items():
        if by_rate(outcomes, form, "loss"):
            pen.line([(x, 13), (x + 24, 13)], color, 2)
            pen.text((x + 30, 7), form, color, font)
            x += 60 + int(font.getlength(form))
    with whole_files.replacing(path, "wb") as file:
        image.save(file, "PNG")

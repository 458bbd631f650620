"""The tables and the pictures, of arms whose runs are done."""

import math
import pathlib
import statistics

from tiny_models.experiments.protocol import AT_KL, STUDENT_T, compare, interpolate

FIGURES = pathlib.Path(__file__).parent / "figures"  # --quick draws elsewhere
NATS = "KL to the reference, nats per reply (square-root scale)"


def frontier_table(arms, **columns):
    """A Markdown table: a row for each arm and price, mean ± std over its runs; and a sentence that says how
    much more gold than the first arm's the others have at the same KL, where that can be compared: steered
    arms beside the first steered one."""
    columns = {"KL": "kl", "gold": "gold", "score": "score", "fluent": "fluency", **columns}
    rows, more = [], []
    for label, arm in arms.items():
        for beta in arm.betas:
            values = [arm.at_beta(beta, name).values() for name in columns.values()]
            if values[0]:
                price = "steered" if arm.steered else f"{beta:g}"
                rows.append([label, price, str(len(values[0])), *map(mean_and_std, values)])
    for steered in (False, True):
        alike = [(label, arm.at_kl()) for label, arm in arms.items() if arm.steered == steered]
        gold = {label: compare("", found, alike[0][1]) for label, found in alike[1:]}
        told = [f"{label} {verdict.numbers()}" for label, verdict in gold.items()
                if len(verdict.differences) > 1]
        more += [f"Gold at {AT_KL} nats, less that of {alike[0][0]}: {'; '.join(told)}."] if told else []
    return "\n\n".join([markdown(["arm", "β", "runs", *columns], rows), *more])


def mean_and_std(values, digits=2):
    """'mean ± std' of the runs' numbers."""
    values = list(values)
    digits = digits if abs(statistics.mean(values)) < 1000 else 0
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):,.{digits}f}{spread}"


def markdown(head, rows):
    """A Markdown table from its first line and its rows, lists of str."""
    if not rows:
        return "Not run yet."
    lines = [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines)


def curves_of(arms, name="gold"):
    """What `draw` takes: of each arm the curves of a number that was measured -> {label: {i: points}}."""
    return {label: arm.curves(name) for label, arm in arms.items()}


def draw(name, curves, title, xlabel=NATS, ylabel="gold", best=None, at_kl=True, ticks=None, top=math.inf,
         bottom=None):
    """FIGURES/NAME.png: of each label's curves, {label: {i: points}}, the mean over runs, and a band that is
    its 95 % interval where all of them are, up to the `top` that is possible; every point a dot; best of n of
    the reference dashed. `ticks`: where on the axis which numbers stand, those of nats unless given;
    `bottom`: where the other axis begins."""
    figure, axis = canvas(title)
    if not figure:
        return
    ends, xs = [], []
    if best and best.results:
        points = [result["best"] for result in best.results.values()]
        x, y = ([statistics.mean(p[k][j] for p in points) for k in range(len(points[0]))] for j in (0, 1))
        axis.plot(x, y, "k--", lw=1)
        ends.append((x[-1], y[-1], "best of n", "k"))
    for number, (label, runs) in enumerate(curves.items()):
        runs, color = [points for points in runs.values() if points], f"C{number}"
        if not runs:
            continue
        axis.plot(*zip(*sum(runs, [])), ".", color=color, alpha=0.35)
        xs += [x for points in runs for x, _ in points]
        low, high = max(p[0][0] for p in runs), min(p[-1][0] for p in runs)
        grid = [low + (high - low) * k / 60 for k in range(61)] if high > low else []
        heights = [[interpolate(points, min(max(x, low), high)) for points in runs] for x in grid]
        if grid:
            axis.plot(grid, [statistics.mean(h) for h in heights], color=color)
            half = [STUDENT_T[len(h) - 1] * statistics.stdev(h) / math.sqrt(len(h)) if len(h) > 1 else 0
                    for h in heights]
            axis.fill_between(grid, [statistics.mean(h) - d for h, d in zip(heights, half)],
                              [min(top, statistics.mean(h) + d) for h, d in zip(heights, half)], color=color,
                              alpha=0.15, lw=0)
            ends.append((high, statistics.mean(heights[-1]), label, color))
        else:
            ends.append((*(statistics.mean(p[-1][k] for p in runs) for k in (0, 1)), label, color))
    if at_kl:
        axis.axvline(math.sqrt(AT_KL), color="gray", lw=0.8, ls=":")
    if xlabel == NATS and xs:
        ticks = {math.sqrt(k): str(k) for k in (0, 1, 2, 4, 6, 10, 20)
                 if min(xs) - 0.3 <= math.sqrt(k) <= max(xs) + 0.2}
    if ticks:
        axis.set_xticks(list(ticks), list(ticks.values()))
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.set_ylim(bottom=bottom)
    beside(axis, ends)
    save(figure, name)


def canvas(title, size=(7.4, 4.4)):
    """A figure with its one plot, under a title that says what it shows -> (figure, axis), or Nones without
    matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None, None
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    axis.set_title(title, loc="left", fontsize=10.5, wrap=True)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def beside(axis, ends):
    """Labels at the ends of their lines, [(x, y, label, color)], none upon another."""
    bottom, top = axis.get_ylim()
    left, right = axis.get_xlim()
    ends = sorted(ends, key=lambda end: end[1])
    at = [(y - bottom) / (top - bottom) for _, y, _, _ in ends]
    for k in range(1, len(at)):
        at[k] = max(at[k], at[k - 1] + 0.055)
    for k in reversed(range(len(at))):
        at[k] = min(at[k], (at[k + 1] if k + 1 < len(at) else 1.03) - 0.055)  # below the title
    for height, (x, y, label, color) in zip(at, ends):
        axis.annotate(label, ((x - left) / (right - left), (y - bottom) / (top - bottom)), (1.03, height),
                      xycoords="axes fraction", textcoords="axes fraction", va="center", color=color,
                      fontsize=9, arrowprops={"arrowstyle": "-", "color": color, "lw": 0.5, "alpha": 0.5})
    axis.set_xlim(left, right)
    axis.set_ylim(bottom, top)


def save(figure, name):
    """Write a picture, the same bytes each time: without the version that a png may hold."""
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / f"{name}.png", dpi=100, metadata={"Software": None})

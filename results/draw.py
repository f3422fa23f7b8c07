"""
The plots of eval.py --plot and bench.py --plot. They need matplotlib, which nothing else here does.
"""

import io

from plumbing.files import write_file


def pyplot():
    """matplotlib.pyplot, drawing to files: it needs no display."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


def attack_success(path, summary):
    """ASR against compute, by the guard and by the judge, and the mean rewards of both against the width: one
    line for each method, a point for each width."""
    from matplotlib.ticker import LogLocator
    summary = [line for line in summary if "asr" in line]
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    methods = list(dict.fromkeys(line["safety"] for line in summary))
    for axis, key, title in ((axes[0], "asr", "by the guard"),
                             (axes[1], "judge_asr", "by the judge")):
        for method in methods:
            mine = [line for line in summary if line["safety"] == method]
            axis.plot([line["tflop"] for line in mine], [line[key] for line in mine], marker="o",
                      label=method)
            for line in mine:
                axis.annotate(str(line["width"]), (line["tflop"], line[key]), textcoords="offset points",
                              xytext=(4, 4), fontsize=7)
        axis.set(xscale="log", xlabel="TFLOP for a reply", title=title, ylim=(-0.02, 1.02))
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
    axes[0].set_ylabel("attack success rate")
    axes[1].legend(fontsize=8)
    for colour, method in enumerate(methods):
        mine = [line for line in summary if line["safety"] == method]
        for key, style in (("judge_reward", "-"), ("guard_reward", ":")):
            axes[2].plot([line["width"] for line in mine], [line[key] for line in mine], style, marker=".",
                         color=f"C{colour}")
    axes[2].set(xscale="log", xlabel="width", ylabel="mean reward",
                title="by the judge (dotted: by the guard)")
    widths = sorted({line["width"] for line in summary})
    axes[2].set_xticks(widths, list(map(str, widths)))
    axes[2].minorticks_off()
    save(figure, path, dpi=110)


def seconds_a_step(path, rows, width, length):
    """Seconds per step against the width (rows of `length` new tokens) and against the length (rows of
    WIDTH)."""
    figure, axes = pyplot().subplots(1, 2, figsize=(9, 3.5), sharey=True, layout="constrained")
    for axis, x, fixed, value, title in ((axes[0], "width", "new", length, f"{length} new tokens"),
                                         (axes[1], "new", "width", width, f"width {width}")):
        mine = sorted((r for r in rows if r[fixed] == value), key=lambda r: r[x])
        for label, seconds in (("trie", "seconds"), ("a copy for each sequence", "copies")):
            points = [(r[x], r[seconds] / r["new"]) for r in mine if r[seconds] is not None]
            if points:
                axis.plot(*zip(*points), marker="o", label=label)
        axis.set(xlabel={"width": "width", "new": "new tokens"}[x], title=title, xscale="log", ylim=0)
        axis.set_xticks([r[x] for r in mine], [str(r[x]) for r in mine], minor=False)
        axis.minorticks_off()
    axes[0].set_ylabel("seconds per step")
    axes[0].legend()
    save(figure, path)


def save(figure, path, dpi="figure"):
    """Write a figure as a file of the kind that its name says."""
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:], dpi=dpi)
    write_file(path, content.getvalue())

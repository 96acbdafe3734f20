"""Draws this folder's SVG pictures: `python docs/pictures/draw.py [NAME ...]`. Needs nothing but Python.

Each picture is a function below, whose docstring is its title and, for those who cannot see it, its description. Colours have
one meaning in all pictures, and follow the reader's light or dark mode. packages.svg has its own script, which reads imports.
"""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path

FOLDER = Path(__file__).parent
WIDTH = 960
LATEST, LOCK, DAMAGED = "latest", "attempt-000007", "damaged-step-00001000"
"""Names in a run folder."""

KINDS = {  # kind: (fill, stroke, text) in light mode, the same in dark mode
    "plain": ("#ffffff", "#8a94a0", "#1f2937", "#262c34", "#7b8794", "#e6e9ed"),
    "muted": ("#eef0f3", "#a7b0ba", "#5b6470", "#2b323b", "#5f6b78", "#a9b3be"),
    "text": ("#dbe8fb", "#2f6fbf", "#174a8c", "#1b3352", "#6ea8ee", "#a9ccf8"),
    "vision": ("#fde6cf", "#c06a13", "#85450a", "#4a3018", "#eda455", "#f6c48c"),
    "both": ("#ebe3fa", "#7448b8", "#54309a", "#34274f", "#b392ee", "#d0bcf6"),
    "state": ("#dcf1e0", "#2c8447", "#1c6135", "#1b3a26", "#67c184", "#9fdcb2"),
    "alarm": ("#fbdfdd", "#bf3d33", "#9c2a21", "#4a211f", "#f0867c", "#f7b1aa"),
}
"""text; vision; both: where they meet, and where ranks agree; state: what is kept; alarm."""


def _style() -> str:
    light, dark = (
        [".page{fill:#fff}.panel{fill:#f6f7f9;stroke:#d5dae0}"],
        [".page{fill:#14181d}.panel{fill:#1b2026;stroke:#39424d}"],
    )
    for rules, first in ((light, 0), (dark, 3)):
        for kind, colours in KINDS.items():
            fill, stroke, text = colours[first : first + 3]
            rules.append(f".b-{kind}{{fill:{fill};stroke:{stroke}}}.l-{kind}{{stroke:{stroke}}}.h-{kind}{{fill:{stroke}}}")
            rules.append(f".t-{kind}{{fill:{text}}}")
    shared = "text{font-family:Helvetica,Arial,'Liberation Sans',sans-serif}.line{fill:none}.dash{stroke-dasharray:5 4}"
    return f"{shared}{''.join(light)}@media (prefers-color-scheme:dark){{{''.join(dark)}}}"


class Picture:
    """One SVG, `WIDTH` pixels wide. A text's y is its baseline; in texts of several lines, one that begins with * is bold."""

    def __init__(self, name: str, about: str) -> None:
        """`about`: the title, an empty line, and the description."""
        self.name, self.height = name, 0
        self.title, _, self.description = about.strip().partition("\n\n")
        self.parts: list[str] = []

    def save(self) -> None:
        size = f'viewBox="0 0 {WIDTH} {self.height}" width="{WIDTH}" height="{self.height}"'
        head = [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-labelledby="title description">',
            f'<title id="title">{escape(self.title)}</title>',
            f'<desc id="description">{escape(" ".join(self.description.split()))}</desc>',
            f"<style>{_style()}</style>",
            f'<rect class="page" width="{WIDTH}" height="{self.height}" rx="8"/>',
        ]
        (FOLDER / f"{self.name}.svg").write_text("\n".join([*head, *self.parts, "</svg>"]) + "\n", encoding="utf-8")

    def text(
        self, x: float, y: float, words: str, size: int = 14, kind: str = "plain", at: str = "start", gap: float = 1.28
    ) -> None:
        for number, line in enumerate(words.split("\n")):
            more = ("" if at == "start" else f' text-anchor="{at}"') + (' font-weight="bold"' if line[:1] == "*" else "")
            where = f'x="{x:g}" y="{y + number * size * gap:g}"'
            line = escape(line.removeprefix("*"))
            self.parts.append(f'<text class="t-{kind}" {where} font-size="{size}"{more}>{line}</text>')

    def box(
        self, x: float, y: float, w: float, h: float, words: str = "", kind: str = "plain", size: int = 14, *, r: int = 5
    ) -> None:
        """A box with text in its middle; r: of its corners."""
        where = f'x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{r}"'
        self.parts.append(f'<rect class="b-{kind}" {where} stroke-width="1.5"/>')
        if words:
            self.text(x + w / 2, y + h / 2 + size * (0.35 - 0.625 * words.count("\n")), words, size, kind, "middle", 1.25)

    def panel(self, x: float, y: float, w: float, h: float, title: str = "", where: str = "", *, below: bool = False) -> None:
        """A quiet background; `where`: the code, beside its title or below it."""
        self.parts.append(f'<rect class="panel" x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="8"/>')
        if title:
            self.text(x + 14, y + 26, f"*{title}", 17)
        if where:
            self.text(*((x + 14, y + 45) if below else (x + w - 14, y + 26)), where, 13, "muted", "start" if below else "end")

    def line(self, *points: tuple[float, float], kind: str = "plain", dash: bool = False, width: float = 2) -> None:
        path = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
        self.parts.append(f'<path class="line l-{kind}{" dash" * dash}" d="{path}" stroke-width="{width:g}"/>')

    def arrow(self, *points: tuple[float, float], kind: str = "plain", dash: bool = False) -> None:
        """A line through points, with a head at the last one."""
        (x0, y0), (x1, y1) = points[-2:]
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        ux, uy = (x1 - x0) / length, (y1 - y0) / length
        self.line(*points[:-1], (x1 - 8 * ux, y1 - 8 * uy), kind=kind, dash=dash)
        head = ((x1, y1), *((x1 - 11 * ux - side * uy, y1 - 11 * uy + side * ux) for side in (5, -5)))
        self.parts.append(f'<polygon class="h-{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in head)}"/>')

    def brace(self, left: float, right: float, y: float) -> None:
        """A bracket open to what is above it."""
        self.line((left, y - 6), (left, y), (right, y), (right, y - 6), kind="muted")


# ---- architecture ----------------------------------------------------------------------------------------------------


def architecture(p: Picture) -> None:
    """A HiMix model, one of its layers, what a query sees, and the cut over pipeline stages

    Only text goes through the decoder. In every layer the text's queries attend to vision keys and text keys together.
    Vision keys and values come from the frozen tower's features, through the layer's own norm weight and projections. Over
    pipeline stages only text states travel; every stage has the features.
    """
    p.height = 800
    _model(p)
    _layer(p)
    _mask(p)
    _stages(p)


def _model(p: Picture) -> None:
    p.panel(16, 16, 292, 524, "(a) The model", "model/himix_model.py, model/towers/", below=True)
    text, vision = 92, 232
    p.text(text, 522, "text tokens", 15, "text", "middle")
    p.text(vision, 522, "images", 15, "vision", "middle")
    for start, end in ((504, 484), (452, 368), (336, 309), (242, 221), (188, 158), (126, 104)):
        p.arrow((text, start), (text, end), kind="text")
    p.box(34, 452, 116, 32, "embedding", "text", 15)
    for y, words in ((336, "layer 1"), (276, "layer 2"), (188, "layer L")):
        p.box(34, y, 116, 32, words, "both", 15)
        p.arrow((vision, y + 16), (152, y + 16), kind="vision")
    p.line((text, 276), (text, 262), kind="text")
    p.text(text, 252, "*...", 20, "text", "middle")
    p.box(34, 126, 116, 32, "norm, head", "text", 15)
    p.text(34, 92, "loss on the answer's tokens", 14, "text")
    for start, end in ((504, 484), (436, 416)):
        p.arrow((vision, start), (vision, end), kind="vision")
    p.box(174, 436, 116, 48, "vision tower,\nfrozen", "vision", 15)
    p.box(174, 380, 116, 36, "u = v / rms(v)", "vision", 15)
    p.line((vision, 380), (vision, 204), kind="vision")
    p.text(180, 138, "the same u\ngoes into\nevery layer", 14, "vision")


def _layer(p: Picture) -> None:
    p.panel(322, 16, 306, 524, "(b) One decoder layer", "model/attention/mixture_attention.py", below=True)
    text, vision = 404, 551
    p.text(text, 522, "text states x", 15, "text", "middle")
    p.text(vision, 522, "features u", 15, "vision", "middle")
    for x, kind in ((text, "text"), (vision, "vision")):
        for start, end in ((504, 472), (442, 420), (372, 346)):
            p.arrow((x, start), (x, end), kind=kind)
    for start, end in ((282, 258), (228, 180), (132, 96)):
        p.arrow((text, start), (text, end), kind="text")
    p.box(354, 442, 106, 30, "norm", "text", 15)
    p.box(354, 372, 106, 48, "q, k, v\nRoPE on q, k", "text", 15)
    p.box(488, 442, 126, 30, "own norm: w * u", "vision")
    p.box(488, 372, 126, 48, "own projection:\nk, v of vision", "vision")
    p.box(354, 282, 260, 64, "*Mixture Attention\nq over [vision keys; text keys]", "both", 15)
    p.box(354, 228, 106, 30, "output, add", "text", 15)
    p.box(354, 132, 106, 48, "norm, MLP,\nadd", "text", 15)
    for y, add in ((492, 243), (208, 156)):
        p.arrow((text, y), (338, y), (338, add), (354, add), kind="text")
    p.text(340, 86, "text states to the next layer", 14, "text")
    p.text(480, 172, "Vision ends here:\nno queries, no MLP,\nno next state.\nIts keys carry no\nposition.", 14, "vision")


def _mask(p: Picture) -> None:
    p.panel(642, 16, 302, 524, "(c) What a query sees", "model/attention/packed_layout.py", below=True)
    x, y, cell, high = 662, 134, 20, 28
    for sample, top, queries in ((1, y, 4), (2, y + 4 * high, 3)):
        left = x
        for kind, of, keys in (("vision", 1, 4), ("text", 1, 4), ("vision", 2, 2), ("text", 2, 3)):
            p.box(left, top, keys * cell, queries * high, "", "plain" if of == sample else "muted", r=0)
            for query in range(queries if of == sample else 0):
                for key in range(keys if kind == "vision" else query + 1):
                    p.box(left + key * cell, top + query * high, cell, high, "", kind, r=2)
            left += keys * cell
    for middle, words, kind in ((2, "vision", "vision"), (6, "text", "text"), (9, "vis.", "vision"), (11.5, "text", "text")):
        p.text(x + middle * cell, y - 10, words, 14, kind, "middle")
    p.text(x + 4 * cell, y - 34, "keys of sample 1", at="middle")
    p.text(x + 10.5 * cell, y - 34, "of sample 2", at="middle")
    said = "Rows are the text's queries of\ntwo samples packed together.\nA query sees all vision of its\n"
    p.text(x, y + 228, f"{said}own sample, the text up to\nitself, and nothing else.", 15)
    for top, kind in ((478, "vision"), (504, "text")):
        p.box(x, top, 16, 16, "", kind)
        p.text(x + 24, top + 13, f"{kind} keys that it sees", 14, kind)


def _stages(p: Picture) -> None:
    p.panel(16, 554, 928, 230, "(d) Cut over pipeline stages", "model/schedule.py")
    for i, words in enumerate(("embedding,\nlayers 1 to 8", "layers 9 to 16", "layers 17 to 24,\nhead, loss")):
        x = 150 + i * 272
        p.box(x, 604, 190, 62, f"*stage {i}\n{words}", "both", 15)
        p.arrow((x + 95, 706), (x + 95, 668), kind="vision")
        if i < 2:
            p.arrow((x + 190, 635), (x + 272, 635), kind="text")
            p.text(x + 231, 624, "text", 14, "text", "middle")
    p.text(34, 632, "text\ntokens", 15, "text")
    p.arrow((92, 635), (148, 635), kind="text")
    p.box(150, 706, 734, 30, "features of all images, on every stage (who makes them: step.svg)", "vision", 15)
    said = "Only text states travel between stages; features never enter the pipeline."
    p.text(34, 766, f"{said} A tower that trains runs on every stage.")


# ---- step ------------------------------------------------------------------------------------------------------------

LANE, GAP, LEFT, OTHER, OTHER_WIDTH = 96, 6, 150, 776, 156
LANES = [LEFT + i * (LANE + GAP) for i in range(6)]
REPLICA_WIDTH = LANES[-1] + LANE - LEFT


def step(p: Picture) -> None:
    """The life of a training step on tensor 2 x pipeline 3 x data 2 ranks

    Loader workers read each rank's texts and its share of the images. All ranks agree whether to stop, encode their shares
    of the images, gather the features in the replica, run the pipeline schedule over the micro-batches, sum gradients over
    data ranks, check, clip and update, report, and now and then save.
    """
    p.height = 1170
    p.panel(LEFT - 8, 16, REPLICA_WIDTH + 16, 1098)
    p.panel(OTHER - 6, 16, OTHER_WIDTH + 12, 1098)
    p.text(LEFT + REPLICA_WIDTH / 2, 40, "*replica 0 (data rank 0)", 17, at="middle")
    p.text(OTHER + OTHER_WIDTH / 2, 40, "*replica 1", 17, at="middle")
    p.text(OTHER + OTHER_WIDTH / 2, 62, "the same on ranks\n2, 3, 6, 7, 10, 11", at="middle")
    for i, rank in enumerate((0, 1, 4, 5, 8, 9)):
        p.text(LANES[i] + LANE / 2, 86, f"rank {rank}\ntensor {i % 2}", at="middle")
        if i % 2 == 0:
            p.text(LANES[i] + LANE + GAP / 2, 64, f"*stage {i // 2}", 15, at="middle")
    for y, words in (
        (144, "*1  Read\ndata/loading/,\nworker processes,\nsteps ahead"),
        (252, "*2  Agree\ntraining/\ntrain_step.py"),
        (344, "*3  Encode\nmodel/\nvision_encoder.py,\none step ahead"),
        (464, "*4  Train\nmodel/schedule.py\n(megatron-core's\n1F1B) over the\nmicro-batches"),
        (662, "*5  Sum\nafter the last\nmicro-batch, or\nwithin it"),
        (760, "*6  Check\nresilience/\nloss_guard.py; the\nhost waits here"),
        (852, "*7  Update\noptimizer.py"),
        (910, "*8  Report\nmonitoring/, at\nintervals"),
        (1004, "*9  Save\ncheckpoint/, at\nintervals, the last\nstep, a new best\nvalidation loss"),
    ):
        title, _, rest = words.partition("\n")
        p.text(16, y, title, 17)
        p.text(16, y + 18, rest, 13, "muted")
    _read_and_encode(p)
    _train(p)
    _update_and_save(p)


def _each(p: Picture, y: float, h: float, words: str, kind: str, there: str) -> None:
    """A box for each rank of replica 0, and one for replica 1."""
    for x in LANES:
        p.box(x, y, LANE, h, words, kind)
    p.box(OTHER, y, OTHER_WIDTH, h, there, kind)


def _all(p: Picture, y: float, words: str, kind: str, there: str | None = None) -> None:
    """One box over a replica's ranks, with its like in replica 1; or one over all ranks."""
    p.box(LEFT, y, REPLICA_WIDTH if there else OTHER + OTHER_WIDTH - LEFT, 34, words, kind, 15)
    if there:
        p.box(OTHER, y, OTHER_WIDTH, 34, there, kind, 15)


def _read_and_encode(p: Picture) -> None:
    for i, x in enumerate(LANES):
        reads = i not in (2, 3)
        p.box(x, 130, LANE, 40, "texts" if reads else "lengths only,\nfrom index", "text" if reads else "muted")
    p.box(OTHER, 130, OTHER_WIDTH, 40, "its own\nmicro-batches", "text")
    _each(p, 176, 40, "decodes 1/6\nof images", "vision", "1/6 each of its\nown images")
    _all(p, 236, "all-reduce over all ranks: has anyone been asked to stop?", "both")
    _all(p, 276, "union of unreadable samples: they keep their slots, without loss", "both", "the same")
    _each(p, 328, 40, "tower on its\n1/6, frozen", "vision", "1/6 each")
    for middle in (*(x + LANE / 2 for x in LANES), OTHER + 40, OTHER + OTHER_WIDTH - 40):
        p.arrow((middle, 368), (middle, 392), kind="vision")
    _all(p, 392, "all-gather in the replica: each rank has all its replica's features", "vision", "all-gather")


def _train(p: Picture) -> None:
    first, top = LEFT + 66, 452
    unit = (LEFT + REPLICA_WIDTH - first) / 18.0
    for stage, passes in enumerate(schedule_1f1b(model_chunks=3, micro_batches=4)):
        p.text(LEFT, top + 23 + stage * 42, f"stage {stage}")
        for start, backward, number in passes:
            width, kind = (2 * unit, "both") if backward else (unit, "text")
            p.box(first + start * unit, top + stage * 42, width - 2, 34, str(number + 1), kind)
    p.box(OTHER, top, OTHER_WIDTH, 118, "the same schedule\nover its own\nmicro-batches")
    said = "Time goes to the right: forward (blue), backward (violet) of micro-batches 1 to 4.\n"
    p.text(LEFT, top + 142, f"{said}Stages pass on text states and their gradients; features are on each rank.")


def schedule_1f1b(model_chunks: int, micro_batches: int) -> list[list[tuple[float, bool, int]]]:
    """For each stage (start, is backward, micro-batch); a forward pass takes 1, a backward pass 2."""
    left = []
    for stage in range(model_chunks):
        warm = min(model_chunks - 1 - stage, micro_batches)
        steady = [one for n in range(micro_batches - warm) for one in ((False, warm + n), (True, n))]
        left.append(
            [(False, n) for n in range(warm)] + steady + [(True, n) for n in range(micro_batches - warm, micro_batches)]
        )
    ends: dict[tuple[int, bool, int], float] = {}
    done: list[list[tuple[float, bool, int]]] = [[] for _ in range(model_chunks)]
    free = [0.0] * model_chunks
    while any(left):
        for stage in (stage for stage in range(model_chunks) if left[stage]):
            backward, n = left[stage][0]
            source = stage + 1 if backward else stage - 1
            ready = ends.get((source, backward, n)) if 0 <= source < model_chunks else 0.0
            if ready is not None:
                start = max(free[stage], ready)
                free[stage] = ends[stage, backward, n] = start + (2 if backward else 1)
                done[stage].append((start, *left[stage].pop(0)))
    return done


def _update_and_save(p: Picture) -> None:
    _each(p, 646, 36, "gradients", "state", "gradients")
    for ends in ((LEFT + REPLICA_WIDTH + 2, OTHER - 2), (OTHER - 2, LEFT + REPLICA_WIDTH + 2)):
        p.arrow(*((x, 664) for x in ends), kind="state")
    _all(p, 688, "sum over data ranks (0+2, 1+3, 4+6, ...), divided by the global batch's number of answer tokens", "state")
    _all(p, 744, "all-reduce over all ranks: loss, tokens, norm, is all finite?", "both")
    _all(p, 784, "LossGuard, alike on every rank: update, skip, roll back, or stop (exit 3)", "both")
    _all(p, 836, "clip by the global norm, then AdamW (with a distributed optimizer each data rank its part)", "state")
    _all(p, 894, "gather the ranks' sums: rank 0 writes the log line and TensorBoard; ledger", "muted")
    _all(p, 934, "too many unreadable samples: stop (exit 3); validation loss; sample predictions", "muted")
    _all(p, 986, "compare the replicas' weights bit for bit: a difference stops the run", "both")
    _each(p, 1026, 40, "copies its\npart", "state", "only what no\nother rank saves")
    _all(p, 1072, "written by a background thread while the next steps train (save.svg)", "state")
    said = "Then the next step, whose features were gathered meanwhile. On CPU ranks 3 runs on a thread, before the\n"
    p.text(LEFT, 1136, f"{said}question of 2. With stored features (data.features) workers read those, and 3 only gathers.")


# ---- save ------------------------------------------------------------------------------------------------------------

POINTS = (  # name, height, whose work, what happens
    ("begin", 54, "", "A save in flight is waited for. Replicas have been\ncompared: they hold the same bits."),
    ("snapshot", 72, "", "Each rank copies its part into host memory, kept\nfrom save to save (pinned beside a GPU).\n"
     "Training waits for this alone."),
    ("tensors", 90, "all ranks", f"Rank 0 makes {LOCK}/step-.../. A distributed\n"
     "optimizer's parts are gathered over data ranks.\nEach rank writes its *.distcp; rank 0 .metadata,\n"
     "common.pt, metadata.json."),
    ("description", 54, "rank 0", "himix.json (model, position, what trained), and the\n"
     "frozen tower: once, in towers/HASH.safetensors."),
    ("sync", 54, "all ranks", "Each rank: fsync of its files, and SHA-256\nof what it reads back from them."),
    ("manifest", 54, "rank 0", "manifest.json: every file's size and hash, its own\n"
     "too. The last file; fsync of file and folder."),
    ("rename", 72, "rank 0", f"The run lock is still ours? Then {LOCK}/step-...\n"
     "becomes checkpoints/step-..., one durable rename:\nfsync of checkpoints/."),
    ("tracker", 62, "rank 0", f"{LATEST}: written in the lock's folder, fsync,\nrenamed over the old one."),
    ("prune", 72, "rank 0", "Beyond keep_last, the best and keep_every: renamed\n"
     "into the lock's folder, then removed. So a name\nstep-... never stands for half a checkpoint."),
)  # fmt: skip
LEFT_BEHIND = (  # from which point to which, and what a kill there leaves
    ("begin", "snapshot", "plain", "*The earlier checkpoints.\nThis one has no folder yet."),
    ("tensors", "manifest", "plain", f"*The earlier checkpoints\nas they were, and a folder\nin {LOCK}/ that does\n"
     "not have its name yet. The\nnext launch takes the lock's\nfolder away, with all in it."),
    ("rename", "rename", "state", "*One or the other:\nthe folder has its name or\nnot, and is whole."),
    ("tracker", "tracker", "state", f"*The new one.\n{LATEST} is whole, old or new;\na launch goes by the folders."),
    ("prune", "prune", "state", "*The new one,\nand perhaps an old one too\nmany, until the next save."),
)  # fmt: skip
AGREEMENT = (
    "*Agreement\n"
    "From tensors to prune no rank passes a point alone: each tells all, in a gloo group that only saves use, what it has\n"
    "done, or why it could not. Then the save fails on all: rank 0 removes the unfinished folder, earlier checkpoints stay,\n"
    "training goes on (checkpoint.max_failures in a row, but the last save must succeed). A launch verifies every byte;\n"
    f"a damaged checkpoint is quarantined as {DAMAGED}. In mode sync training waits until all is done."
)


def save(p: Picture) -> None:
    """How a checkpoint is saved, and what a kill at each point leaves

    The training thread copies the state into host memory and trains on. A background thread writes tensors, himix.json and
    hashes, then manifest.json, and renames the folder: from then on the checkpoint counts. Then the file latest is replaced
    and old checkpoints are removed. Between points all ranks agree. A kill before the rename leaves the earlier
    checkpoints.
    """
    p.height = 944
    train, saves, point, what, leaves = 20, 98, 192, 298, 704
    for x, words in ((train + 34, "*training\n*thread"), (saves + 34, "*save's\n*thread")):
        p.text(x, 34, words, at="middle")
    for x, words in ((point, "*point"), (what, "*what happens"), (leaves, "*a kill here leaves")):
        p.text(x, 52, words, 15)
    p.text(what + 392, 52, "checkpoint/async_save.py, snapshot.py", 13, "muted", "end")
    y, span = 70.0, {}
    for name, height, who, words in POINTS:
        span[name] = (y, y + height)
        p.panel(what - 118, y, 510, height)
        p.text(point, y + height / 2 + 5, f"*{name}", 15)
        p.text(what, y + height / 2 - words.count("\n") * 9 + 5, words)
        if who:
            p.box(saves, y, 68, height, who, "both" if who == "all ranks" else "state")
        y += height + (44 if name == "rename" else 14)
    for first, last, kind, words in (
        ("begin", "snapshot", "alarm", "step n\nis done:\nstands\nstill"),
        ("tensors", "tensors", "text", "step\nn + 1"),
        ("description", "manifest", "text", "step\nn + 2"),
        ("rename", "prune", "text", "step\nn + 3"),
    ):
        p.box(train, span[first][0], 68, span[last][1] - span[first][0], words, kind)
    hand_over = span["snapshot"][1] - 20
    p.arrow((train + 68, hand_over), (saves + 34, hand_over), (saves + 34, span["tensors"][0] - 2), kind="state")
    for first, last, kind, words in LEFT_BEHIND:
        top, end = span[first][0], span[last][1]
        p.box(leaves, top, 240, end - top, "", kind)
        p.text(leaves + 10, (top + end) / 2 - words.count("\n") * 9 + 5, words, 14, kind)
    cut = span["rename"][1] + 15
    p.line((what - 118, cut), (944, cut), kind="state", width=3)
    p.text(what, cut + 20, "Above this line the earlier checkpoint is the newest, below it the new one.", 14, "state")
    p.panel(16, y, 928, 118)
    p.text(30, y + 28, AGREEMENT)


# ---- stop ------------------------------------------------------------------------------------------------------------


BEYOND = (
    "*Where that does not reach\n"
    "Rank 0 is lost: each rank sees its own connection close, or gets no answer, and exits. A node loses power: TCP keepalive\n"
    "closes its connections within half a minute. Native code holds Python's lock: a timer in C writes that rank's stacks and\n"
    "ends it 7 s after the timeout. After any of these the same command resumes from the newest checkpoint."
)


def stop(p: Picture) -> None:
    """How a run stops when it is asked to, and how ranks notice that one of them died or hangs

    A signal is recorded and passed through rank 0 to all ranks, which agree at the next step boundary, save, and exit with
    85; the batch script requeues the job. A rank that dies closes its connection to rank 0, one that hangs gives no
    heartbeat: the cause is named, stacks are written to the log, and all ranks exit with 1.
    """
    p.height = 1102
    _asked_to_stop(p)
    _dies(p)
    _hangs(p)
    p.panel(16, 982, 928, 104)
    p.text(30, 1008, BEYOND)


def _lifelines(p: Picture, top: float, *lives: tuple[str, float, float]) -> None:
    """Dashed lines down from named boxes. `lives`: name, x, where it ends."""
    for name, x, bottom in lives:
        p.line((x, top + 28), (x, bottom), kind="muted", dash=True, width=1.5)
        p.box(x - 55, top, 110, 28, name)


def _message(p: Picture, y: float, start: float, end: float, words: str, kind: str = "text", *, dash: bool = False) -> None:
    p.arrow((start, y), (end, y), kind=kind, dash=dash)
    p.text((start + end) / 2, y - 7, words, 14, kind, "middle")


def _asked_to_stop(p: Picture) -> None:
    p.panel(16, 16, 928, 508, "(a) Asked to stop", "runtime/stop_signals.py, resilience/watchdog.py, training/train_step.py")
    slurm, rank, zero, others, batch = 88, 322, 504, 686, 874
    exits = 410
    _lifelines(p, 52, ("Slurm", slurm, 504), ("rank 3", rank, exits), ("rank 0", zero, exits), ("other ranks", others, exits))
    _lifelines(p, 52, ("batch script", batch, 440))
    left, wide = rank - 66, others - rank + 132
    _message(p, 114, slurm, rank, "TERM, USR1, USR2", "alarm")
    p.text(slurm + 10, 136, "before the time limit,\nat a preemption, by\nhand: to any one rank", 14, "muted")
    p.box(left, 124, 132, 44, "StopRequest:\nrecorded")
    _message(p, 192, rank, zero, "stop requested")
    _message(p, 216, zero, others, "stop")
    p.arrow((zero, 216), (rank, 216), kind="text")
    p.text(
        others + 12, 120, 'Before step 1 rank 0\nsays "leave" instead:\nall exit at once, with\nnothing to save.', 14, "muted"
    )
    p.box(left, 234, wide, 46, '*next step boundary\nall-reduce of "stop requested?"; waits for data are broken off', "both")
    p.box(
        left,
        290,
        wide,
        46,
        "*CheckpointPolicy.save_before_exit\nthe step whose data all ranks have is finished and saved",
        "state",
    )
    p.box(left, 346, wide, 30, "goodbye to the peers, so that nobody takes it for a death", "muted")
    _message(p, exits, others, batch, "exit 85")
    p.line((rank, exits), (others, exits), kind="text")
    _message(p, 440, batch, slurm, "scontrol requeue")
    p.arrow((slurm, 488), (left - 2, 488), kind="state")
    p.text((slurm + left) / 2, 481, "when nodes are free", 14, "state", "middle")
    p.box(left, 472, wide, 32, "the same command goes on with the next step: none is lost", "state")


def _dies(p: Picture) -> None:
    p.panel(16, 538, 456, 430, "(b) A rank dies or fails", "resilience/watchdog.py")
    dead, zero, other = 92, 244, 396
    _lifelines(p, 578, ("rank 2", dead, 760), ("rank 0", zero, 856), ("rank 1", other, 856))
    p.box(dead - 62, 620, 124, 30, "killed", "alarm")
    _message(p, 676, dead, zero, "connection closes", "alarm")
    p.text((dead + zero) / 2, 694, "without goodbye", 14, "alarm", "middle")
    p.box(dead - 62, 706, 124, 30, "or: an exception", "alarm")
    _message(p, 760, dead, zero, "failed: reason", "alarm")
    p.box(zero - 68, 768, 136, 44, "0.2 s: who else?\nnames the cause", "both")
    _message(p, 836, zero, other, "end: rank 2 died")
    for x in (zero, other):
        p.box(x - 50, 856, 100, 28, "exit 1", "alarm")
    said = "All ranks end within 2 s, whatever they do. srun ends\nthe job step; a failed job is not requeued, but a job\n"
    p.text(30, 914, f"{said}that lost a node waits for Slurm to requeue it.")


def _hangs(p: Picture) -> None:
    p.panel(488, 538, 456, 430, "(c) A rank hangs", "resilience/watchdog.py")
    hung, zero, other = 564, 716, 868
    _lifelines(p, 578, ("rank 2", hung, 856), ("rank 0", zero, 856), ("rank 1", other, 856))
    p.box(hung - 62, 620, 124, 44, "hangs: others\nwait for it", "alarm")
    p.box(zero - 66, 620, 284, 44, "no heartbeat (step/forward, ...) on a\nrank for parallel.timeout_seconds", "both")
    _message(p, 690, other, zero, "stuck", "alarm")
    p.box(hung - 62, 728, 428, 28, "each writes its threads' stacks to RUN/log/rank-NNN.log")
    for x in (other, hung):
        _message(p, 716, zero, x, "show")
        _message(p, 844, zero, x, "end")
    _message(p, 784, other, zero, "position")
    _message(p, 784, hung, zero, "position, if it can", "alarm", dash=True)
    p.box(zero - 66, 794, 284, 28, "all answers, or 2 s: who is behind?", "both")
    for x in (hung, zero, other):
        p.box(x - 50, 856, 100, 28, "exit 1", "alarm")
    said = '"rank 2 is the farthest behind, at step/backward", or\n"rank 2 does not answer". A collective would give\n'
    p.text(502, 914, f"{said}up 15 s later, and could not say who hung.")


# ---- data order ------------------------------------------------------------------------------------------------------

EPOCH = (1, 2, 12, 23, 29, 9, 8, 7, 11, 24, 21, 20, 18, 3, 4, 28, 10, 27, 14, 30, 19, 15, 25, 31, 16, 17, 26, 6, 5, 13, 22, 0)
PACKS = (
    *((1, 9), (2, 29), (12, 21), (23, 8, 11), (7, 3), (24, 18, 4), (20, 28)),
    *((10, 26), (27, 30, 16), (14, 17), (19, 6), (15, 25, 13), (31, 5), (22, 0)),
)
TEXTS = (6, 4, 4, 6, 3, 5, 5, 2, 1, 2, 2, 5, 6, 1, 3, 5, 2, 5, 1, 3, 5, 2, 2, 2, 4, 2, 6, 3, 3, 3, 3, 3)
IMAGES = (1, 2, 2, 1, 1, 1, 1, 2, 1, 1, 2, 0, 2, 1, 0, 0, 1, 0, 0, 1, 2, 1, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1)
"""What data/loading/ makes of 4 shards of 8 samples with so many text tokens and images (seed 1234, fingerprint "example") in
windows of 16 samples, the first 7 packs from one and the others from the next: at most 8 text tokens and 3 images a pack."""
CELL, FIRST = 26, 112
PITCH = 16 * CELL / 7
"""From a pack to the next."""


def data_order(p: Picture) -> None:
    """From shards to the steps of each rank: epoch, window, pack, step

    Each epoch is a permutation of all samples by seed, epoch and dataset fingerprint. It is cut into windows, whose samples
    are put into packs within two budgets. A step takes the next packs; data ranks take them in turn; a replica's ranks
    share the images. Where a run stands is four numbers.
    """
    p.height = 974
    for y, words in (
        (40, "*shards\ndata/shards/"),
        (132, "*epoch 0\ndata/loading/\nshuffle.py"),
        (262, "*packs\ndata/loading/\npacking.py"),
        (428, "*steps\ndata/loading/\nplan.py"),
        (528, "*ranks\ndata/loading/\nloader.py,\nbatch.py"),
    ):
        title, _, rest = words.partition("\n")
        p.text(16, y, title, 16)
        p.text(16, y + 19, rest, 13, "muted")
    _samples(p)
    _packs_and_steps(p)
    _shares(p)
    _position(p)


def _samples(p: Picture) -> None:
    for y, order in ((34, tuple(range(32))), (118, EPOCH)):
        for place, sample in enumerate(order):
            p.box(FIRST + place * CELL, y, CELL, CELL, str(sample), "state" if sample < 8 else "plain", r=0)
    for shard in range(4):
        x = FIRST + shard * 8 * CELL
        p.text(x, 27, f"shard {shard}")
        p.line((x, 30), (x, 64), width=3)
    p.text(FIRST, 84, "Samples of all datasets, numbered through. Shard 0 is green, to follow it.", 14, "muted")
    for window in range(2):
        left = FIRST + window * 16 * CELL
        p.brace(left + 3, left + 16 * CELL - 3, 152)
        p.text(left + 8 * CELL, 180, f"window {window}: here 16 samples, really 8,192", at="middle")
    said = "A permutation drawn from (seed, epoch, dataset fingerprint): nothing to store. Samples that cannot be used\n"
    p.text(FIRST, 204, f"{said}(too long, no place in the template) are left out, window by window.", 14, "muted")


def _packs_and_steps(p: Picture) -> None:
    for i, pack in enumerate(PACKS):
        _pack(p, FIRST + i * PITCH + 3, 252, pack, "both" if i % 2 else "text")
    p.line((FIRST + 7 * PITCH, 244), (FIRST + 7 * PITCH, 374), dash=True)
    said = "A pack is full at either budget: text tokens (height, here 8) or vision tokens (orange, 3 images)."
    p.text(FIRST, 392, f"{said} Packs never cross a window.", 14, "muted")
    for first, end, words in ((0, 4, "step 0"), (4, 8, "*step 1"), (8, 12, "step 2"), (12, 14, "step 3, and on")):
        p.brace(FIRST + first * PITCH + 4, FIRST + end * PITCH - 4, 412)
        p.text(FIRST + (first + end) / 2 * PITCH, 438, words, at="middle")
    said = "A step takes the next packs, here 4, of the same window or the next. Data ranks take them in turn (blue, violet),\n"
    p.text(FIRST, 464, f"{said}so any number of data ranks that divides the batch reads the same global batches.", 14, "muted")


def _pack(p: Picture, x: float, top: float, samples: tuple[int, ...], kind: str) -> None:
    """A pack: its samples' texts from the bottom up, 14 pixels high for each token, and an orange square an image."""
    p.box(x, top, 52, 114, "", "muted", r=0)
    bottom = top + 113.0
    for sample in samples:
        height = TEXTS[sample] * 14
        middle = bottom - height / 2
        p.box(x + 1, bottom - height, 50, height, "", kind, r=2)
        p.text(x + 5, middle + 5, str(sample), 14 if height > 14 else 12, kind)
        for k in range(IMAGES[sample]):
            p.box(x + 27 + k * 12, middle - 4.5, 9, 9, "", "vision", r=0)
        bottom -= height


def _shares(p: Picture) -> None:
    p.panel(FIRST - 8, 504, 500, 454, "Step 1 on its ranks")
    for data_rank, kind in ((0, "text"), (1, "both")):
        x, packs = FIRST + 8 + data_rank * 246, PACKS[4 + data_rank : 8 : 2]
        p.text(x, 560, f"*data rank {data_rank}", 15, kind)
        for number, pack in enumerate(packs):
            p.text(x + number * 112, 584, f"micro-batch {number}")
            _pack(p, x + number * 112 + 18, 594, pack, kind)
        p.text(x, 736, "texts: first and last stage", 14, "text")
        p.text(x, 762, "images: a share for each rank", 14, "vision")
        images = [f"{sample}.{k}" for pack in packs for sample in pack for k in range(IMAGES[sample])]
        for i, name in enumerate(images):
            p.box(x + i * 37, 774, 35, 28, name, "vision", 13, r=2)
        for rank in range(3):
            p.brace(x + rank * 74 + 2, x + rank * 74 + 70, 810)
            p.text(x + rank * 74 + 37, 832, f"replica\nrank {rank}", at="middle")
    said = "Each rank has about an n-th of the tower's work (here a\nreplica of 3 ranks). A rank decodes only "
    p.text(FIRST + 8, 896, f"{said}what it encodes:\nimage k of sample s is s.k.", 14, "muted")


def _position(p: Picture) -> None:
    p.panel(626, 504, 318, 454, "DataPosition after step 1")
    values = (
        ("epoch", 0, "which permutation"),
        ("window", 1, "within the epoch"),
        ("pack", 1, "within the window: next"),
        ("samples", 18, "behind it, for schedules"),
    )
    for i, (name, value, words) in enumerate(values):
        y = 548 + i * 40
        p.text(642, y + 20, f"*{name}", 15)
        p.box(716, y, 40, 30, str(value), "state", 15)
        p.text(766, y + 20, words, 14, "muted")
    said = (
        "Four numbers, in each checkpoint's\nhimix.json. Every rank computes the\nsame plan from them: none tells\n"
        "another what to read. A resume\ncontinues at this pack, with any\nnumber of data ranks that divides\nthe batch. "
        "What else fixes the order\n(SamplingPlan.fingerprint_fields:\ndata, seed, batch, tokenizer,\n"
        "template, budgets) must be what\nit was."
    )
    p.text(642, 742, said)


# ---- run folder ------------------------------------------------------------------------------------------------------

RUN_FOLDER = (  # depth, name, kind, what is in it, who writes it, who reads it
    (0, "RUN/", "plain", "", "", ""),
    (1, "config.json", "text", "all settings", "rank 0, once restored",
     "the next launch names what differs;\nevaluate, generate, serve, tools"),
    (1, "checkpoints/", "state", "", "", ""),
    (2, "step-00001000/", "state", "one checkpoint", "all ranks (save.svg)",
     "the next launch, at any layout;\nevaluate, generate, serve, convert"),
    (3, "manifest.json", "state", "size, SHA-256 of each file", "rank 0, last", "whoever opens the checkpoint, first"),
    (3, "himix.json", "state", "model, position, what trains", "rank 0", "whoever opens the checkpoint"),
    (3, ".metadata, *.distcp, ...", "state", "weights, optimizer", "each rank its part", "megatron-core, once verified"),
    (2, LATEST, "state", "name of the newest", "rank 0", "people, other tools"),
    (2, f"{LOCK}/", "state", "run lock: whose folder it is;\nsaves under way", "rank 0 of launch 7;\ntouched every 4 s",
     "another launch: refused while\nthe owner lives, else takes over"),
    (2, f"{DAMAGED}/", "alarm", "a checkpoint that failed its\nverification", "a launch that finds it",
     "people, who then delete it"),
    (1, "towers/HASH.safetensors", "vision", "a frozen tower, once", "rank 0, first save", "every checkpoint that names it"),
    (1, "journal.jsonl", "both", "launches, saves, rollbacks,\nends, with time by cause", "rank 0",
     "the next launch: crash loops,\nrollbacks, goodput"),
    (1, "STOP", "alarm", "why it stopped by itself", "rank 0, with exit code 3",
     "the next launch refuses;\nslurm, scaling report, people"),
    (1, "log/rank-000.log, ...", "plain", "the story; stacks of threads", "each rank its own",
     "people; rank 0's: slurm, scaling"),
    (1, "tensorboard/", "plain", "metrics, predictions, scores", "rank 0; evaluate", "TensorBoard; scaling report"),
    (1, "evaluation/", "plain", "answers and scores", "pipelines.evaluate", "itself, to resume; people"),
    (1, "ledger/*.jsonl", "muted", "each step's samples, loss", "first rank of a replica", "audits (with log.ledger)"),
    (1, "profile/*.json.gz", "muted", "traces of chosen steps", "a rank of each stage", "Perfetto (with log.profile-steps)"),
    (1, "slurm/", "muted", "job script, what jobs print", "slurm.submit, Slurm", "slurm.submit --watch, people"),
)  # fmt: skip
LAUNCH = (
    ("both", "*A launch reads,\nbefore ranks meet:",
     ("STOP?", "newest intact\ncheckpoint", "config.json:\nearlier settings", "journal.jsonl:\ncrash loop?")),
    ("state", "*then owns and\nwrites:",
     ("run lock", "every byte\nverified", "restored at\nthis layout", "config.json written,\nSTOP removed")),
)  # fmt: skip


def run_folder(p: Picture) -> None:
    """What a run folder holds, who writes it and who reads it

    A table in the shape of a folder tree: config.json, checkpoints, towers, journal.jsonl, STOP, log, tensorboard,
    evaluation, and on request ledger, profile and slurm. Below it, in which order a launch reads and then writes them.
    """
    p.height = 1030
    columns = (16, 246, 470, 656)
    for x, words in zip(columns, ("*file or folder", "*what is in it", "*who writes it", "*who reads it"), strict=True):
        p.text(x, 34, words, 15)
    y = 46.0
    parents: dict[int, float] = {}
    for number, (depth, name, kind, *cells) in enumerate(RUN_FOLDER):
        height = 36 + 18 * max(cell.count("\n") for cell in cells)
        if number % 2:
            p.parts.append(f'<rect class="panel" stroke-width="0" x="8" y="{y:g}" width="944" height="{height:g}"/>')
        middle, x = y + 19, columns[0] + depth * 18
        if depth:
            p.line((x - 12, parents[depth - 1]), (x - 12, middle - 5), (x - 4, middle - 5), kind="muted", width=1.5)
        parents[depth] = middle + 6
        p.text(x, middle, f"*{name}" if name.endswith("/") and depth < 2 else name, 14, kind)
        for column, cell in zip(columns[1:], cells, strict=True):
            p.text(column, middle, cell)
        y += height
    y += 14
    p.panel(8, y, 944, 158)
    for row, (kind, title, steps) in enumerate(LAUNCH):
        top = y + 12 + row * 72
        p.text(20, top + 26, title)
        for i, words in enumerate(steps):
            p.box(160 + i * 200, top, 168, 56, words, kind)
            if i:
                p.arrow((128 + i * 200, top + 28), (158 + i * 200, top + 28))


PICTURES = (architecture, step, save, stop, data_order, run_folder)


def main() -> None:
    for make in PICTURES:
        if len(sys.argv) == 1 or make.__name__ in sys.argv[1:]:
            assert make.__doc__ is not None
            p = Picture(make.__name__, make.__doc__)
            make(p)
            p.save()


if __name__ == "__main__":
    main()

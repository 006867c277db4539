"""A report: one HTML file, complete in itself, in which a person can look at every cell."""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped, UInt8
from torch import Tensor

from adaptok.errors import ShapeError, StorageError
from adaptok.optional import import_optional
from adaptok.see.report_runs import ReportRun, ReportStep, read_run
from adaptok.storage import write_text
from adaptok.tracing import Trace

MOST_STEPS, LEAST_STEPS = 16, 3
WATCHED = (
    "Mean over steps and samples. ms are measured while the model is watched, which takes longer "
    "than without: adaptok.benchmark measures it alone."
)
ROOM = 2.8e6  # bytes that images and cells may take, about
LONGEST = 256  # edge of an image in the file
SCRIPTS = ("report_data.js", "report_paint.js", "report_cards.js", "report_page.js")
FOOTER = "Made by adaptok. This file holds all of its data and loads nothing."
UNKNOWN, OWN, NONE = 127, 128, 65_535
LOSSLESS = 64  # images up to this edge are stored pixel by pixel


def write_report(
    traces: Trace | Mapping[str, Trace],
    images: Shaped[Tensor, "b 3 h w"]
    | Sequence[Shaped[Tensor, "b 3 h w"]]
    | Mapping[str, Sequence[Shaped[Tensor, "b 3 h w"]]],
    path: str | Path,
    *,
    names: Sequence[str] = (),
    step_names: Sequence[str] = (),
    results: Mapping[str, Shaped[Tensor, "b 3 h w"]] | None = None,
    title: str = "Where the model spends its tokens",
    note: str = "",
) -> Path:
    """Write traces of a wrapped model as one HTML file with sliders over steps and budgets.

    Args:
        traces: what `adaptok.trace` gave: one trace, or several by the names of their budgets.
        images: what the model was shown, before it was normalised: uint8, or floats in [0, 1]. One
            batch for all steps and budgets, one batch for each step, or those by budget.
        path: the file; folders on the way are made.
        names: what each sample shows.
        step_names: the steps in words.
        results: for a model that draws images, what they became, by budget.
        title: headline.
        note: what was run, below the headline.

    Returns:
        The path.

    Raises:
        ShapeError: traces, images and names do not fit each other, or cells have no places.
        DtypeError: the images have no pixels that can be shown.
        StorageError: the file cannot be written.
        MissingPackageError: Pillow is not installed.

    Example:
        >>> import adaptok, tempfile, torch
        >>> from adaptok.testing import make_vit
        >>> vit = adaptok.wrap(make_vit(), chunker="dc", budget=1.0)
        >>> images, seen = torch.rand(2, 3, 32, 48), {}
        >>> for keep in (0.5, 0.25):
        ...     with adaptok.budget(vit, keep=keep), adaptok.trace(vit) as seen[f"keep {keep}"]:
        ...         out = vit(images)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_report(seen, images, f"{folder}/report.html").stat().st_size > 10_000
        True
    """
    if isinstance(traces, Trace):
        traces = {"this run": traces}
    runs = []
    for name, trace in traces.items():
        given = images[name] if isinstance(images, Mapping) else images
        made = None if results is None else results.get(name)
        runs.append(read_run(name, trace, given, step_names=step_names, results=made))
    return write_runs(runs, path, names=names, title=title, note=note)


def write_runs(
    runs: Sequence[ReportRun],
    path: str | Path,
    *,
    names: Sequence[str] = (),
    title: str = "Where the model spends its tokens",
    note: str = "",
    caption: str = WATCHED,
    start: tuple[int, int] = (0, 0),
) -> Path:
    """Write runs as one HTML file (see `write_report`, which makes them from traces).

    Args:
        runs: one per budget, on the same samples, image size and grid.
        path: the file; folders on the way are made.
        names: what each sample shows.
        title: headline.
        note: what was run, below the headline.
        caption: what the costs refer to.
        start: budget and step that are shown first.

    Returns:
        The path.

    Raises:
        ShapeError: the runs do not fit each other, or there is not one name for each sample.
        StorageError: the file cannot be written.
        MissingPackageError: Pillow is not installed.
    """
    path = Path(path)
    page = pack_page(runs, names)
    page["start"] = [start[0], min(start[1], len(page["runs"][0]["steps"]) - 1)]
    costs = "; ".join(describe_cost(run) for run in runs)
    text = fill_template(
        {
            "title": html.escape(title),
            "note": html.escape(note),
            "caption": html.escape(caption),
            "costs": html.escape(costs),
            "footer": html.escape(FOOTER),
            "style": read_template("report.css"),
            "script": "\n".join(read_template(name) for name in SCRIPTS),
            # a name could hold the end of the script element
            "data": json.dumps(page, separators=(",", ":")).replace("<", "\\u003c"),
        }
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make the folder {path.parent}: {error}") from error
    write_text(path, text)
    return path


def describe_cost(run: ReportRun) -> str:
    """Say what a step of a run costs."""
    cost = run.mean_cost
    known = "" if cost is None else f", {cost[0]:.3f} GFLOPs, {cost[1]:.2f} ms"
    return f"{run.name}: {run.mean_tokens:.1f} tokens{known}"


def read_template(name: str) -> str:
    """Return a file of the page."""
    folder = package_files("adaptok").joinpath("see", "templates")
    return folder.joinpath(name).read_text(encoding="utf-8").strip()


def fill_template(parts: Mapping[str, str]) -> str:
    """Put parts where the page names them, each once; what a part holds is left alone."""
    pieces = read_template("report.html").split("{{")
    filled = [pieces[0]]
    for piece in pieces[1:]:
        name, _, rest = piece.partition("}}")
        filled += [parts[name], rest]
    return "".join(filled) + "\n"


def pack_page(runs: Sequence[ReportRun], names: Sequence[str]) -> dict[str, Any]:
    """Return everything that the page shows, as plain values.

    Args:
        runs: one per budget.
        names: what each sample shows.

    Raises:
        ShapeError: see `write_runs`.
    """
    if not runs:
        raise ShapeError("a report needs at least one run")
    first = runs[0].steps[0]
    for run in runs:
        same = run.grid == runs[0].grid and run.steps[0].given.shape == first.given.shape
        if not same:
            raise ShapeError(
                f"the runs {runs[0].name!r} and {run.name!r} of a report need the same samples, "
                "image size and grid"
            )
    b = first.token.shape[0]
    if names and len(names) != b:
        raise ShapeError(f"a report needs one name per sample, got {len(names)} for {b}")
    album = Album()
    most = count_steps(runs)
    packed = [pack_run(run.choose_steps(most), album) for run in runs]
    height, width = album.scale(first.given[0]).shape[:2]
    return {
        "grid": list(runs[0].grid),
        "size": [width, height],
        "samples": list(names) or [f"sample {number + 1}" for number in range(b)],
        "given": "what the model is given",
        "seen": "the clean image it sees",
        "view": "kept" if first.keep_prob is not None else "tokens",
        "runs": packed,
        "pictures": album.pictures,
    }


def count_steps(runs: Sequence[ReportRun]) -> int:
    """Return how many steps of each run fit into the file."""
    first = runs[0].steps[0]
    b, h, w = first.given.shape[:3]
    shrink = min(1.0, LONGEST / max(h, w)) ** 2
    # noise does not get smaller by PNG; a cell takes three bytes; all of it is written as text
    image = h * w * shrink * (4.0 if h <= LOSSLESS else 0.6)
    frame = image * (1 if first.clean is None else 2) + 4.0 * first.token.shape[1]
    return int(min(MOST_STEPS, max(LEAST_STEPS, ROOM / (len(runs) * b * frame))))


class Album:
    """Pictures as data addresses, each stored once."""

    def __init__(self) -> None:
        self.pictures: list[str] = []
        self.known: dict[bytes, int] = {}

    def scale(self, pixels: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h2 w2 3"]:
        """Return an image that is not larger than the file can afford."""
        longest = max(pixels.shape[:2])
        if longest <= LONGEST:
            return pixels
        module = import_optional("PIL.Image", extra="see")
        h, w = (max(1, round(edge * LONGEST / longest)) for edge in pixels.shape[:2])
        small = module.fromarray(np.ascontiguousarray(pixels)).resize((w, h), module.LANCZOS)
        return np.asarray(small)

    def add(self, pixels: UInt8[np.ndarray, "h w 3"]) -> int:
        """Store a picture, unless it is there, and return its number."""
        key = bytes(str(pixels.shape), "ascii") + pixels.tobytes()
        if key not in self.known:
            self.known[key] = len(self.pictures)
            self.pictures.append(encode_picture(pixels))
        return self.known[key]

    def add_strip(self, images: Sequence[UInt8[np.ndarray, "h w 3"]]) -> dict[str, Any]:
        """Store the images of all steps side by side; one image that stays is stored once."""
        still = all(np.array_equal(image, images[0]) for image in images[1:])
        small = [self.scale(image) for image in (images[:1] if still else images)]
        return {"picture": self.add(np.concatenate(small, axis=1)), "still": still}


def encode_picture(pixels: UInt8[np.ndarray, "h w 3"]) -> str:
    """Return a picture as a data address: small ones as PNG, larger ones as WebP."""
    module = import_optional("PIL.Image", extra="see")
    target = io.BytesIO()
    picture = module.fromarray(np.ascontiguousarray(pixels))
    if pixels.shape[0] <= LOSSLESS:
        picture.save(target, "PNG", optimize=True)
        kind = "png"
    else:
        picture.save(target, "WEBP", quality=82)
        kind = "webp"
    return f"data:image/{kind};base64,{base64.b64encode(target.getvalue()).decode()}"


def pack_run(run: ReportRun, album: Album) -> dict[str, Any]:
    """Return a run as plain values; cells in one byte string for all steps and samples."""
    b = run.steps[0].token.shape[0]
    tokens = np.stack([np.where(step.token < 0, NONE, step.token) for step in run.steps])
    marks = np.stack([mark_cells(step) for step in run.steps])
    cleans = [step.clean for step in run.steps]
    cost = run.mean_cost
    packed: dict[str, Any] = {
        "name": run.name,
        "tokens": round(run.mean_tokens, 3),
        "gflops": cost and cost[0],
        "ms": cost and cost[1],
        "passes": run.passes,
        "token": base64.b64encode(tokens.astype("<u2").tobytes()).decode(),
        "mark": base64.b64encode(marks.tobytes()).decode(),
        "given": [album.add_strip([step.given[i] for step in run.steps]) for i in range(b)],
        "clean": None,
        "final": None,
        "steps": [
            {
                "name": step.name,
                "tokens": [int(count) for count in step.tokens],
                "gflops": step.gflops,
                "ms": step.ms,
            }
            for step in run.steps
        ],
    }
    known = [clean for clean in cleans if clean is not None]
    if len(known) == len(cleans):
        packed["clean"] = [album.add_strip([clean[i] for clean in known]) for i in range(b)]
    if run.results is not None:
        packed["final"] = [album.add(album.scale(image)) for image in run.results]
    return packed


def mark_cells(step: ReportStep) -> UInt8[np.ndarray, "b n"]:
    """Return a byte for each cell: its keep probability in per cent, and whether it is its own."""
    if step.keep_prob is None:
        prob = np.full(step.own.shape, UNKNOWN)
    else:
        prob = (100 * step.keep_prob.clip(0, 1)).round()
    marks: UInt8[np.ndarray, "b n"] = (prob.astype(np.uint8) + OWN * step.own).astype(np.uint8)
    return marks

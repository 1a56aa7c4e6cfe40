"""``report.html``: a result as one page that needs nothing else, to be sent to a colleague, printed or kept.

Opening it tells nobody (see ``page``).
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from bsafusion import page
from bsafusion.about import NOT_CLINICAL
from bsafusion.report import ALIGN_AND_FUSE, FUSE_ONLY, MODES, Panel, told_share, unlike_fitted
from bsafusion.trust import judged_error

LONGEST_SIDE = 1024
"""Pixels a side of a picture in the page: enough for the eye, small enough for an e-mail."""

Sentence = tuple[str, str]


def words(report: Mapping[str, Any]) -> list[Sentence]:
    """The evidence of a report in words: a name and a sentence for each, lengths in pixels of the fixed grid.

    Raises:
        ValueError: the report lacks the evidence.
    """
    evidence = report.get("alignment")
    if not isinstance(evidence, Mapping) or not isinstance(report.get("status"), str):
        raise ValueError(
            "report.json has no status or no alignment; expected a report of bsafusion; fuse the pair again"
        )
    known = {name: float(value) for name, value in evidence.items() if isinstance(value, int | float)}
    sentences: list[Sentence] = []
    mode = report.get("mode", ALIGN_AND_FUSE)
    if MODES.get(mode):
        sentences.append(("Asked for", _sentence(MODES[mode])))
    sentences += _trust_words(report)
    if (error := known.get("expected_error")) is not None:
        sentences.append(
            ("Expected error", f"The network expects its field to be off by {error:.1f} px on average inside the head.")
        )
    if (judged := known.get("assessed_error")) is not None:
        told = judged_error(judged, max(report["inputs"]["fixed"]["size"]))
        sentences.append(("Judged error", f"Judged from the aligned pair as a whole, the field is off by {told}."))
    before, after = known.get("similarity_before"), known.get("similarity_after")
    if before is not None and after is not None:
        change = _change(before, after)
        sentences.append(
            (
                "Similarity",
                f"The likeness of the two images, as the network describes them (1 is the most), {change}: "
                f"{before:.3f} before alignment, {after:.3f} after.",
            )
        )
    if mode == FUSE_ONLY:
        if before is not None:
            text = (
                f"The likeness of the two images as given, as the network describes them (1 is the most): {before:.3f}."
            )
            sentences.append(("Similarity", text))
        return sentences + _colour_words(report.get("colour"))
    mean, largest = known.get("displacement_mean"), known.get("displacement_max")
    if mean is not None and largest is not None:
        text = (
            f"Inside the head the moving image was moved by {mean:.1f} px on average and by {largest:.1f} px at most."
        )
        sentences.append(("Movement", text))
    if (folded := known.get("folded_share")) is not None:
        part = f"in {told_share(folded, 2)} of the pixels" if folded > 0 else "nowhere"
        sentences.append(("Folds", f"The field folds {part}."))
    if (outside := known.get("outside_share")) is not None:
        part = f"{told_share(outside, 1)} of the head".capitalize() if outside > 0 else "No part of the head"
        text = f"{part} lies outside the moving image."
        if (cut := known.get("cut_share")) is not None and cut >= 0.1:
            text += f" The moving image ends at a straight line beyond which {cut:.0%} of the head lies."
        sentences.append(("Coverage", text))
    sentences += _mirrored_words(known.get("disagreement")) + _refinement_words(report.get("refinement"))
    return sentences + _colour_words(report.get("colour"))


def _trust_words(report: Mapping[str, Any]) -> list[Sentence]:
    """The estimated chance that the result is wrong, and what it was not fitted to; nothing where there is none."""
    trust = report.get("trust")
    if not isinstance(trust, Mapping) or trust.get("probability_off") is None:
        return []
    text = (
        f"The chance that the result is off by more than {trust['off_from_px']:.3g} px is put at "
        f"{trust['probability_off']:.1%}; from {trust['suspect_from']:.1%} on it counts as suspect."
    )
    if unusual := unlike_fitted(report.get("options", {})):
        text += f" It was fitted to results {unusual}."
    return [("Chance of being wrong", text)]


def _mirrored_words(distance: float | None) -> list[Sentence]:
    """That the mirror images were aligned as well, in a sentence; nothing where they were not."""
    if distance is None:
        return []
    text = (
        "The alignment is the mean of the network's answers for the two images and for their mirror images; each lies "
        f"{distance:.2f} px from that mean, on average inside the head."
    )
    return [("Mirror images", text)]


def _refinement_words(refinement: Any) -> list[Sentence]:
    """What the gradient steps made of the alignment, in a sentence; nothing where there were none."""
    if not isinstance(refinement, Mapping):
        return []
    steps, before, after = (refinement[name] for name in ("steps", "objective_before", "objective_after"))
    many = f"{steps} gradient step" if steps == 1 else f"{steps} gradient steps"
    text = (
        f"The network's field was refined by {many}; their objective (lower is better) {_change(before, after)}: "
        f"{before:.3f} before, {after:.3f} after."
    )
    return [("Refinement", text)]


def _change(before: float, after: float) -> str:
    """In the three decimals that are printed."""
    return "did not change" if f"{before:.3f}" == f"{after:.3f}" else ("rose" if after > before else "fell")


def _colour_words(colour: Any) -> list[Sentence]:
    """What was measured of the fused colours, in a sentence; nothing of a grey picture."""
    error = colour.get("hue_error_median_deg") if isinstance(colour, Mapping) else None
    if error is None:
        return []
    text = (
        f"Where the moving image is coloured, the hue of the fused image differs by {error:.2f}° (median); "
        f"{colour['clipped_share']:.2%} of the pixels are clipped."
    )
    return [("Colour", text)]


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def render(
    report: Mapping[str, Any],
    panels: Mapping[str, tuple[str, Panel]],
    expected_error: NDArray[np.float32] | None,
) -> str:
    """The page as text; the same for the same arguments.

    Args:
        report: the content of ``report.json``.
        panels: identifiers, each with a name and a picture ``3 H W`` in [0, 1], as ``FusionResult.panels``: ``fixed``
            and ``moving``, and what else is to be shown.
        expected_error: ``H W``, pixels; None where there is none.

    Raises:
        ValueError: no fixed or no moving panel, or a report without evidence.
    """
    if not {"fixed", "moving"} <= panels.keys():
        raise ValueError(f"panels {', '.join(panels) or 'none'}; expected fixed, moving and what else is to be shown")
    figures = [_figure(identifier, name, page.picture_of(panel)) for identifier, (name, panel) in panels.items()]
    if expected_error is not None:
        largest = max(float(expected_error.max()), 1e-6)
        caption = f"expected error: dark 0 px, bright {largest:.1f} px"
        figures.append(_figure("expected-error", caption, _coloured(expected_error / largest), data=f"{largest:.6g}"))
    inputs: Mapping[str, Mapping[str, Any]] = report["inputs"]
    title = f"{inputs['moving']['file'] or 'moving image'} on {inputs['fixed']['file'] or 'fixed image'}"
    body = [
        f"<header><h1>{escape(title)}</h1><p>Alignment and fusion by bsafusion. <strong>{NOT_CLINICAL}</strong></p>",
        "</header>",
        _banner(report["status"], report["reasons"], report["mode"]),
        '<section id="swipe"></section>',
        f'<section><h2>Pictures</h2><div class="figures">{"".join(figures)}</div></section>',
        _table("Evidence", words(report)),
        "".join(_table(f"{role.capitalize()} image", _rows(image)) for role, image in inputs.items()),
        _table("Grids", _rows(report["grid"])),
        _table("Settings", _rows(report["options"])),
        _table("Versions", _rows(report["versions"])),
        f"<footer><strong>{NOT_CLINICAL}</strong></footer>",
    ]
    return page.document(f"{report['status']}: {title}", body, style=_STYLE, script=_SCRIPT)


def pictures(text: str) -> dict[str, tuple[PIL.Image.Image, float | None]]:
    """What :func:`render` put into a page: ``fixed``, ``moving``, ``expected-error`` and so on, as far as it has them.

    Each with the value that its brightest level stands for, where there is one: ``expected-error`` has 256 levels
    (its palette's indices) from 0 to that many pixels.

    Raises:
        ValueError: a picture in the page is damaged.
    """
    found: dict[str, tuple[PIL.Image.Image, float | None]] = {}
    for identifier, largest, data in _EMBEDDED.findall(text):
        try:
            picture = PIL.Image.open(io.BytesIO(base64.b64decode(data)), formats=["PNG"])
            if max(picture.size) > LONGEST_SIDE:
                raise ValueError(f"{picture.size} pixels; expected at most {LONGEST_SIDE} a side")
            picture.load()
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"picture {identifier} of the report page is damaged ({error}); fuse again") from error
        found[identifier] = (picture, float(largest) if largest else None)
    return found


_EMBEDDED = re.compile(
    r'<img id="([a-z0-9-]+)"(?: data-largest="([0-9.e+-]+)")? alt="[^"]*" src="data:image/png;base64,([A-Za-z0-9+/=]+)"'
)


def _coloured(unit: NDArray[np.float32]) -> PIL.Image.Image:
    """Values in [0, 1] as a palette picture: colours for the eye, its indices keep the values."""
    # Before it gets its palette: a reduced picture must average the values, not the indices' colours.
    picture = _reduced(page.picture_of(unit))
    table = np.round(page.coloured(np.arange(256) / 255) * 255).astype(np.uint8)
    picture.putpalette(table.T.tobytes())
    return picture


def _reduced(picture: PIL.Image.Image) -> PIL.Image.Image:
    scale = LONGEST_SIDE / max(picture.size)
    if scale >= 1:
        return picture
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    return picture.resize(size, PIL.Image.Resampling.BOX)


def _figure(identifier: str, caption: str, picture: PIL.Image.Image, *, data: str = "") -> str:
    attributes = f' id="{identifier}"' + (f' data-largest="{data}"' if data else "")
    return page.figure(caption, _reduced(picture), attributes=attributes)


def _banner(status: str, reasons: list[str], mode: str) -> str:
    what = "that the images lie on each other" if mode == FUSE_ONLY else "the alignment"
    note = f"<p>{_sentence(MODES[mode])}</p>" if MODES[mode] else ""
    if status == "ok":
        text = f"<p>No check found a reason to doubt {what}.</p>"
        return f'<section class="verdict ok"><h2>ok</h2>{text}{note}</section>'
    items = "".join(f"<li>{escape(reason)}</li>" for reason in reasons)
    trusted = "that the images lie on each other" if mode == FUSE_ONLY else "this alignment"
    return (
        f'<section class="verdict suspect" role="alert"><h2>{escape(status)}</h2>'
        f"<p>Do not trust {trusted} without looking closely:</p><ul>{items}</ul>{note}</section>"
    )


def _rows(record: Mapping[str, Any]) -> list[Sentence]:
    return [(name.replace("_", " "), _text(value)) for name, value in record.items() if value not in (None, "", {})]


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{name.replace('_', ' ')}: {_text(entry)}" for name, entry in value.items())
    if isinstance(value, list | tuple):
        return " × ".join(_text(entry) for entry in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _table(heading: str, rows: list[Sentence]) -> str:
    lines = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(text)}</td></tr>' for name, text in rows)
    return f"<section><h2>{escape(heading)}</h2><table>{lines}</table></section>"


_STYLE = """
:root { --ok: #17663a; --ok-back: #e3f4e9; --bad: #fff; --bad-back: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ok: #a5e0bb; --ok-back: #17301f; } }
@media screen { body { max-width: 1080px; } }
section:empty { display: none; }
.verdict h2 { font-size: 22px; text-transform: uppercase; letter-spacing: .06em; margin: 0; }
.verdict ul { margin: 4px 0; padding-left: 20px; }
.ok { background: var(--ok-back); color: var(--ok); }
.suspect { background: var(--bad-back); color: var(--bad); border: 3px solid var(--bad-back); }
.suspect h2::before { content: "\\26A0  "; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 12px; }
table { width: 100%; }
th, td { vertical-align: top; padding: 4px 12px 4px 0; overflow-wrap: anywhere; }
th { width: 190px; }
tr:first-child > * { border-top: 0; }
.pair { position: relative; max-width: 560px; margin: 8px auto; background: #000; cursor: ew-resize;
  touch-action: none; user-select: none; }
.pair img { display: block; width: 100%; pointer-events: none; }
.pair .over { position: absolute; inset: 0; height: 100%; }
.pair .divider { position: absolute; top: 0; bottom: 0; width: 2px; margin-left: -1px; background: #ffd54a; }
.controls { display: flex; gap: 12px; flex-wrap: wrap; justify-content: center; align-items: center; }
input[type=range] { width: 220px; }
@media print {
  :root { --page: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #bbb; --ok: #000; --ok-back: #fff;
    --bad: #b3261e; --bad-back: #fff; color-scheme: light; }
  section { margin: 8px 0; padding: 8px; }
  .suspect { border-color: #b3261e; }
  .figures { grid-template-columns: repeat(3, 1fr); }
  #swipe { display: none; }
  figure, tr, .verdict { break-inside: avoid; }
}
"""

_SCRIPT = """
(() => {
  const make = (tag, parent, properties = {}) =>
    parent.appendChild(Object.assign(document.createElement(tag), properties));
  const labelled = (text, tag, properties) => make(tag, make("label", controls, { textContent: text }), properties);
  const source = (id) => document.getElementById(id).src;
  const root = document.getElementById("swipe");
  make("h2", root, { textContent: "Swipe: fixed on the left" });
  const pair = make("div", root, { className: "pair" });
  const others = [["aligned", "moving, aligned"], ["moving", "moving, as it came"], ["fused", "fused"]]
    .filter(([id]) => document.getElementById(id));
  const right = make("img", pair, { alt: "", src: source(others[0][0]) });
  const left = make("img", pair, { className: "over", alt: "", src: source("fixed") });
  const divider = make("div", pair, { className: "divider" });
  const controls = make("div", root, { className: "controls" });
  const range = labelled("Divider ", "input", { type: "range", min: 0, max: 100 });
  const choice = labelled("on the right ", "select");
  for (const [id, name] of others) make("option", choice, { value: id, textContent: name });
  const show = () => {
    left.style.clipPath = `inset(0 ${100 - range.value}% 0 0)`;
    divider.style.left = `${range.value}%`;
  };
  const drag = (event) => {
    if (!event.buttons) return;
    const box = pair.getBoundingClientRect();
    range.value = (100 * (event.clientX - box.left)) / box.width;
    show();
  };
  pair.addEventListener("pointerdown", (event) => { pair.setPointerCapture(event.pointerId); drag(event); });
  pair.addEventListener("pointermove", drag);
  range.addEventListener("input", show);
  choice.addEventListener("change", () => { right.src = source(choice.value); });
  show();
})();
"""

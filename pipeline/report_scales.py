"""The report's parts about scales and sizes: ladder of resolutions, a head for any size, upsampling, editing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.report_tables import caveats, distortion_cells, heading, percent, section, table

MEASURES = {"psnr": "PSNR", "perceptual_lite0": "perceptual", "fd_lite0": "fd_lite0"}
UPSAMPLED = {
    "upsampled": "upsampled by the prior",
    "bicubic": "bicubic",
    "upsampled_as_decoded": "upsampled, as decoded",
    "bound": "bound: the true tokens",
    "bound_as_decoded": "bound, as decoded",
}


def size_of(entry: dict[str, Any]) -> str:
    """Height and width as text."""
    return "x".join(map(str, entry["image_size"]))


def ladder_part(metrics: dict[str, Any]) -> str:
    """Every rung beside the baseline, agreement of tokens, and sampling time, as far as they were measured."""
    ladder = metrics.get("ladder")
    if ladder is None:
        return ""
    words = "An image reduced by averaging to the size of a rung, and the tokens of its first scales."
    rungs = ladder.get("rungs", [])
    if rungs:
        words = (
            f"{ladder['num_images']:,} held-out images reduced by averaging, encoded and decoded at their own size, "
            "and compared with the reduced images. Bits are for each pixel of the rung's image."
        )
        words += caveats(rungs[0]["tokenizer"])
        if ladder["baseline"] is not None:
            words += (
                " The baseline knows the full size only: it gets the reduced image enlarged (bicubic), its result is "
                "reduced again, and it spends all of its tokens."
            )
            if rungs[0]["baseline"].get("fd_lite0", {}).get("same_backbone_as_loss"):
                words += " The baseline's loss used the network of these distances too."
    return "".join(
        (
            heading("Ladder of resolutions", words),
            rung_table(rungs) if rungs else "",
            agreement_words(ladder["agreement"]),
            time_table(metrics),
        )
    )


def rung_table(rungs: list[dict[str, Any]]) -> str:
    """One line a rung and tokenizer."""
    rows = []
    compared = "better" in rungs[0]
    for rung in rungs:
        for who in ("tokenizer", "baseline") if compared else ("tokenizer",):
            entry = rung[who]
            row = [
                f"{size_of(rung)}, {who}" if compared else size_of(rung),
                f"{entry['tokens_per_image']:g}",
                f"{entry['fixed_length_bits_per_pixel']:.3f}",
                f"{entry['entropy_bits_per_pixel']:.3f}",
                *distortion_cells(entry),
                f"{entry['images_per_second']:.1f}",
            ]
            if compared:
                wins = [MEASURES[key] for key, winner in rung["better"].items() if winner == who]
                row.append(", ".join(wins) or "–")
            rows.append(row)
    head = ["Image", "Tokens", "Bits/px", "by entropy", "PSNR, dB", "Perceptual", "fd_lite0", "Images/s"]
    return table(head + ["Better in"] * compared, rows)


def agreement_words(entry: dict[str, Any]) -> str:
    """How many tokens of reduced images equal the first tokens of the full ones."""
    words = (
        f"Of {entry['positions']:,} tokens of reduced images, {entry['agreeing_share']:.4%} equal those with which the "
        f"full image begins; {entry['mismatches']:,} do not"
    )
    if entry["mismatches"] and entry["mismatches_that_are_ties"] is not None:
        words += (
            f", of which {entry['mismatches_that_are_ties']:,} are ties of two codes (margin under "
            f"{entry['tie_below']:g}; the largest is {entry['largest_margin_of_a_mismatch']:.1e})"
        )
    return f"<p>{words}.</p>"


def time_table(metrics: dict[str, Any]) -> str:
    """Time of sampling up to each rung."""
    timed = metrics["ladder"].get("sampling_time")
    if timed is None:
        return ""
    words = (
        f"Sampling up to each rung: median of {timed['repeats']} runs of {timed['sequences']} sequences on "
        f"{metrics['settings']['device']}, tokens alone, without decoder and text encoder. Time over tokens is 1 where "
        "time grows like the tokens."
    )
    rows = [
        [
            size_of(entry),
            str(entry["tokens"]),
            f"{entry['seconds']:.3f}",
            percent(entry["share_of_full_time"]),
            percent(entry["share_of_tokens"]),
            f"{entry['time_over_tokens']:.2f}",
        ]
        for entry in timed["rungs"]
    ]
    head = ["Image", "Tokens", "Seconds", "Share of full time", "Share of tokens", "Time over tokens"]
    return f'<p class="soft">{words}</p>' + table(head, rows)


def upsampling_part(metrics: dict[str, Any], folder: Path) -> str:
    """Upsampled images beside bicubic and the tokenizer's bounds."""
    found = metrics.get("upsampling")
    if found is None:
        return ""
    words = (
        f"{found['num_images']:,} held-out images reduced by averaging to {found['from']} px and upsampled to "
        f"{found['to']} px. A sample is one of many likely images, so PSNR favours what is blurred; consistency is the "
        "PSNR of the result, reduced again, against the small image. Results are drawn to the small image, which is "
        "known exactly, by back-projection, and blended with bicubic; beside them what the decoder gave."
        + caveats(found["rows"]["upsampled"])
    )
    rows = [
        [
            UPSAMPLED[name],
            *distortion_cells(entry),
            f"{entry['ssim']:.3f}" if "ssim" in entry else "–",
            f"{entry['consistency_psnr']:.2f}",
        ]
        for name, entry in found["rows"].items()
    ]
    head = ["Result", "PSNR, dB", "Perceptual", "fd_lite0", "SSIM", "Consistency, dB"]
    return section("Upsampling", words, folder / "upsampling.png") + table(head, rows)


def editing_part(metrics: dict[str, Any], folder: Path) -> str:
    """How far images follow a new prompt, and how far they keep what was frozen."""
    found = metrics.get("editing")
    if found is None:
        return ""
    words = (
        f"{found['num_images']:,} held-out images keep their first scales; the rest is drawn anew, with their own "
        "prompt or with that of an image of another class (named at the left). A classifier of the training images "
        "says how probable that new class is. Consistency is the PSNR against the original, both reduced to the size"
        " of what was kept."
    )
    names = {"before": "decoded only", "own_prompt": "own prompt", "new_prompt": "new prompt"}
    rows = [
        [
            f"{entry['frozen']} ({size_of(entry)})",
            names[key],
            f"{entry[key]['probability_of_new_class']:.3f}",
            percent(entry[key]["classified_as_new_class"]),
            f"{entry[key]['consistency_psnr']:.2f}",
        ]
        for entry in found["frozen"]
        for key in names
    ]
    head = ["Scales kept", "Rest", "Probability of new class", "Classified as it", "Consistency, dB"]
    return section("Editing", words, folder / "editing.png") + table(head, rows)


def head_part(metrics: dict[str, Any], folder: Path) -> str:
    """The head at every size beside the decoder or bicubic; nothing where it was not measured."""
    found = metrics.get("head")
    if found is None:
        return ""
    words = (
        f"{found['num_images']:,} held-out photos from their tokens alone, at the tokenizer's own {found['own_size']} "
        "px and larger, compared with the photos themselves; beside it the decoder's image, enlarged (bicubic)."
        + caveats(found["sizes"][0]["head"])
    )
    rows = [
        [f"{size_of(entry)}, {name}", *distortion_cells(entry[key])]
        for entry in found["sizes"]
        for key, name in (("head", "head"), ("decoded", "decoder"), ("bicubic_of_decoded", "decoder and bicubic"))
        if key in entry
    ]
    own = found["sizes"][0]["head_against_decoded"]
    return section(
        "Any size", f"{words} At its own size the head is {own:.2f} dB from the decoder.", folder / "head.png"
    ) + table(["Image", "PSNR, dB", "Perceptual", "fd_lite0"], rows)

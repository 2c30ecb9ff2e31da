"""An encoder in words: how it came about, and how good its vectors are on which pictures, from its model card."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from export.suggest import program
from serving.protocol.shown import counted
from ui.search.picture import with_code

UNKNOWN = (
    f"nothing is known yet about how good these vectors are; `{program('training/evaluate.py')} runs/NAME/encoder "
    "--data ~/Pictures` measures it"
)
HARDLY = 0.1  # of the way from chance to no error at all
MARGIN = 0.01  # a smaller difference of two shares is none
RIGHT = {
    "knn": "have the right label by their nearest ones",
    "found_first": "come first when they are searched by a changed view of them",
    "views_matched": "are found by a random view of them",
}


def title(card: Mapping[str, Any]) -> str:
    """Such as "tiny, distilled"."""
    training = card.get("training") or {}
    if training.get("distillation"):
        how = "distilled"
    elif training.get("finetuning"):
        how = "fine-tuned"
    elif training.get("origin"):  # an encoder of others, or another run's
        how = "trained further" if training.get("epochs") else "as published"
    else:
        how = "trained from nothing" if training.get("epochs") else ""
    precision = card.get("precision", "fp32")
    name = str(card.get("architecture") or card["id"])
    return ", ".join(part for part in (name, how, "" if precision == "fp32" else precision) if part)


def titles(cards: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The title of each encoder by its id; of equal ones with the name of the run, or else with the end of the id."""
    plain = [title(card) for card in cards]
    named = [f"{name} ({run_of(card)})" for card, name in zip(cards, plain, strict=True)]
    found = {}
    for card, name, with_run in zip(cards, plain, named, strict=True):
        if plain.count(name) > 1:
            name = with_run if run_of(card) and named.count(with_run) == 1 else f"{name} ({card['id'][-6:]})"
        found[card["id"]] = name
    return found


def run_of(card: Mapping[str, Any]) -> str:
    """Name of the run that the encoder was exported from; empty for an encoder of others."""
    training = card.get("training") or {}
    settings = next((training[kind] for kind in ("distillation", "finetuning", "settings") if training.get(kind)), {})
    return str(settings.get("name") or "")


def sentence(card: Mapping[str, Any]) -> str:
    """How good the vectors are, without the encoder's name. Text between backticks is code."""
    figures = card.get("figures") or {}
    if (lost := figures.get("quantized")) and "measured" not in figures:
        return _quantized(lost)
    return _measured(*_latest(card)) or UNKNOWN


def _latest(card: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any], str]:
    """The latest figures of the vectors, those before training, and the name of the pictures."""
    figures, training = card.get("figures") or {}, card.get("training") or {}
    if measured := figures.get("measured"):
        return measured, {}, measured.get("data", "")
    before, after = (figures.get(name) or {} for name in ("before", "after"))
    return after, before, training.get("data", "")


def doubt(card: Mapping[str, Any]) -> str:
    """Why the neighbours that the encoder finds mean little; empty if its card gives no reason."""
    figures, before, _ = _latest(card)
    key = next((key for key in ("knn", "found_first", "views_matched") if key in figures), None)
    if key is None:
        return ""
    value, pictures = figures[key], figures.get("judged") or figures.get("pictures")
    chance = figures.get("chance", 1 / pictures if pictures else None)
    said = f"{_percent(value)} {RIGHT[key]}"
    if chance is not None and value - chance < HARDLY * (1 - chance):
        return f"its neighbours are hardly better than chance: {said}, and by chance it would be {_percent(chance)}"
    if "pixels" in figures and value - figures["pixels"] < MARGIN:
        then = _percent(figures["pixels"])
        return f"its neighbours are hardly better than those of raw pixels: {said}, and {then} with those"
    if key in before and value - before[key] < MARGIN:
        return f"training has not made its neighbours better: {said}, and {_percent(before[key])} before"
    return ""


def _measured(figures: Mapping[str, Any], before: Mapping[str, Any], data: str) -> str:
    """Empty without a figure of the vectors."""
    if "knn" in figures:
        key, of = "knn", f"of {counted(figures['queries'])} of {data}, "
        nearest = "nearest one" if figures["k"] == 1 else f"{figures['k']:,} nearest ones"
        words = f"have the right label by their {nearest}"
    elif "found_first" in figures:
        key, of = "found_first", f"of {counted(figures['judged'])} of {data}, "
        words = "come first when they are searched by a changed view of them"
    elif "views_matched" in figures:
        key, of = "views_matched", f"of {counted(figures['pictures'])} of {data}, "
        words = "are found by a random view of them, as training draws them"
    elif "agreement" in figures:
        key, of = "agreement", f"of the ten nearest of each of {counted(figures['pictures'])} of {data}, "
        words = "are the same as its teacher's"
    else:
        return ""
    earlier = f"; {_percent(before[key])} before training" if key in before else ""
    return f"{of}{_percent(figures[key])} {words}{earlier}"


def _quantized(lost: Mapping[str, Any]) -> str:
    if "knn" in lost:
        return (
            f"of {counted(lost['asked'])} of {lost['data']}, {_percent(lost['knn'])} have the right label by their "
            f"nearest ones; {_percent(lost['knn_original'])} before the encoder was made smaller"
        )
    return (
        f"of the ten nearest of each of {counted(lost['pictures'])} of {lost['data']}, "
        f"{_percent(lost['neighbours_kept'])} stayed the same when the encoder was made smaller"
    )


def quality_html(cards: Sequence[Mapping[str, Any]], shown: Sequence[str]) -> str:
    """A paragraph for each of the encoders with the ids `shown`, and a warning if its neighbours mean little."""
    names, by_id = titles(cards), {card["id"]: card for card in cards}
    ids = [id for id in dict.fromkeys(shown) if id in by_id]
    doubts = [(names[id], words) for id in ids if (words := doubt(by_id[id]))]
    warnings = (f'<p class="doubt" role="note"><b>{escape(name)}</b>: {escape(words)}.</p>' for name, words in doubts)
    lines = (f'<p class="quality">{with_code(f"{names[id]}: {sentence(by_id[id])}.")}</p>' for id in ids)
    return "".join([*warnings, *lines])


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"

"""What a diagnosis says in words and tables."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

What = Literal["separability", "detector", "samples", "supervised", "shortcuts", "dfr", "recovery", "certificate"]


def summary(values: dict[str, Any]) -> str:
    """diagnosis.json as markdown: what each figure means, beside what the clean rows give."""
    how = values["setting"]
    lines = [
        f"# Diagnosis of {how['dataset']}, protected with {how['method']}",
        "",
        f"{how['published_rows']:,} published rows and the clean rows behind them, {how['validation_rows']:,} clean "
        f"validation and {how['test_rows']:,} clean test rows, {how['image_size'][0]} x {how['image_size'][1]} pixels, "
        f"{how['classes']} classes. Network {how['backbone']}, recipe {how['recipe']}, seed {how['seed']}: one key and "
        "one seed, so that no figure has a spread.",
        "",
        "**Nothing here is a promise.** What finds nothing has found nothing at this setting; another trainer may.",
    ]
    for name, (title, told) in PAGES.items():
        entry = values["diagnostics"].get(name, {})
        if "figures" in entry:
            lines += ["", f"## {title}", "", *told(entry["figures"], entry["setting"], how)]
        elif "skipped" in entry:
            lines += ["", f"## {title}", "", f"Skipped: {entry['skipped']}."]
    return "\n".join(lines)


def headlines(values: dict[str, Any]) -> list[str]:
    """A sentence on each diagnostic that is finished or skipped."""
    lines = []
    for name, (_, told) in PAGES.items():
        entry = values["diagnostics"].get(name, {})
        if "figures" in entry:
            lines.append(f"{name}: {told(entry['figures'], entry['setting'], values['setting'])[0]}")
        elif "skipped" in entry:
            lines.append(f"{name}: skipped, {entry['skipped']}")
    return lines


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _epochs(count: int) -> str:
    return f"{count} epoch" if count == 1 else f"{count} epochs"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["", *(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)), ""]


def _of_separability(found: dict[str, Any], own: dict[str, Any], how: dict[str, Any]) -> list[str]:
    one = found["linear"]
    measures = ("delta_train", "delta_held_out", "published_held_out", "clean_held_out")
    names = {"linear": "linear", "tanh": f"{own['hidden']} tanh layer(s)"}
    rows = [[names[kind], *(_percent(f[f"{name}_accuracy"]) for name in measures)] for kind, f in found.items()]
    independent = how["classes"] / how["published_rows"]
    return [
        f"From the perturbation alone a linear reader names the class of {_percent(one['delta_held_out_accuracy'])} of "
        f"{one['held_out_rows']:,} held-out rows (chance {_percent(how['chance'])}); from the published pictures of "
        f"{_percent(one['published_held_out_accuracy'])}, from the clean ones of "
        f"{_percent(one['clean_held_out_accuracy'])}.",
        *_table(["reader", "perturbation, rows it was fitted to", "perturbation", "published", "clean"], rows),
        "Held-out rows but for the first column. The perturbation adds "
        f"{100 * one['shortcut_gap']:+.1f} points to what a linear reader gets from the pictures. Its class energy "
        f"ratio is {one['class_energy_ratio']:.3f}: 1 where a class has one perturbation, about {independent:.3f} "
        "where all rows have independent ones. What is read so simply is a shortcut that a network finds soon, and "
        "one that may be as simple to detect or to project away; what is not may be a shortcut still.",
    ]


def _of_detector(found: dict[str, Any], own: dict[str, Any], how: dict[str, Any]) -> list[str]:
    def verdict(published: dict[str, Any], clean: dict[str, Any]) -> str:
        over = [score["validation_accuracy"] > score["threshold"] for score in (published, clean)]
        if over[1]:
            return "the clean rows are called poisoned too: the verdict says nothing about such pictures"
        return "called poisoned, the clean rows are not" if over[0] else "not called poisoned"

    names = {"linear": "linear", "two_layer": "two layers"}
    names["bias_shift"] = f"{how['backbone']}, shown darker pictures alone"
    rows = []
    for kind, scores in found.items():
        figures = [_percent(scores[name]["validation_accuracy"]) for name in ("published", "clean")]
        rows.append([names[kind], *figures, verdict(scores["published"], scores["clean"])])
    score, epochs = found["two_layer"]["published"], own["detector_epochs"]
    paper = "" if epochs >= 100 else "; the paper trains for 100, and may then find more"
    return [
        f"A network of two layers is right on {rows[1][1]} of {score['validation_rows']:,} held-out published rows "
        f"(one trained on the clean rows: {rows[1][2]}); the verdict at {_percent(score['threshold'])}: {rows[1][3]}.",
        *_table(["network", "published", "clean", "verdict"], rows),
        f"{_epochs(epochs)}{paper}. Always answering with the commonest class gives {_percent(score['chance'])}. A "
        "verdict is no proof: it warns a trainer, and shows that something simple names the class"
        + (", or something that does not change with the brightness." if "bias_shift" in found else "."),
    ]


def _of_samples(found: dict[str, Any], own: dict[str, Any], how: dict[str, Any]) -> list[str]:
    far = max(found["points"], key=lambda point: abs(point["auc"] - 0.5))
    return [
        f"In {_percent(far['auc'])} of pairs a published row is learnt sooner than a clean one (after "
        f"{_epochs(far['epochs'])}, of those tried the farthest from chance; chance {_percent(0.5)} ± "
        f"{_percent(found['chance_deviation'])}).",
        *_areas_table(found["points"], [_epochs(point["epochs"]) for point in found["points"]]),
        "Half of the rows published, the others clean, and one network trained on all of them; the score of a row is "
        "its loss. The reference needs no training: were the published rows like the clean ones, it would be chance. A "
        "high area breaks nothing by itself, but a trainer may leave out what scores high and train on the rest.",
    ]


def _of_supervised(found: dict[str, Any], own: dict[str, Any], how: dict[str, Any]) -> list[str]:
    return [
        f"A network that was taught on {found['pairs'][0]:,} pairs made under another key tells published from clean "
        f"rows in {_percent(found['auc'])} of pairs (chance {_percent(0.5)} ± {_percent(found['chance_deviation'])}).",
        *_areas_table([found], ["taught under another key"]),
        f"{found['pairs'][1]:,} rows of either kind that it was not taught on. The worst case: the trainer has the "
        "method and clean pictures, only not the key. What is found can be left out, or be worked on with other means.",
    ]


def _areas_table(points: Sequence[dict[str, Any]], names: Sequence[str]) -> list[str]:
    measures = ("auc", "fpr_at_95_tpr", "half_total_error")
    rows = [[name, *(_percent(p[one]) for one in measures)] for name, p in zip(names, points, strict=True)]
    head = ["", "area under the curve", "clean rows taken along to find 95 %", "half total error"]
    return _table(head, [*rows, ["chance", _percent(0.5), _percent(0.95), _percent(0.5)]])


def _of_shortcuts(found: dict[str, Any], own: dict[str, Any], how: dict[str, Any]) -> list[str]:
    kinds = {
        "own": "published",
        "same_class": "clean + perturbation of another row of its class",
        "next_class": "clean + perturbation of a row of the next class",
        "next_class_as_delta": "the same, taken for the next class",
        "none": "clean",
    }
    victims = [found["published"], found["clean"]]
    rows = [[told, *(_percent(v["held_out"][kind]) for v in victims)] for kind, told in kinds.items()]
    rows.append(["clean test rows", *(_percent(v["test_accuracy"]) for v in victims)])
    rows.append(["its own training rows, as shown last", *(_percent(v["train_accuracy"]) for v in victims)])
    rows.append(["R_p on clean test rows", *(f"{v['reliance']:.4f}" for v in victims)])
    here, clean = (victim["held_out"] for victim in victims)
    return [
        f"Trained on {found['train_rows']:,} published rows, a victim is right on {_percent(here['own'])} of "
        f"{found['held_out_rows']:,} other published rows, on {_percent(here['same_class'])} under the perturbation of "
        f"another row of the class, on {_percent(here['next_class'])} under one of the next class, and on "
        f"{_percent(here['none'])} of the same rows clean (a victim of clean rows: {_percent(clean['none'])}).",
        *_table(["held-out rows", "victim of published rows", "victim of clean rows"], rows),
        f"Chance is {_percent(found['chance'])}; where a victim has not learnt its own rows, the rest says nothing. "
        "Right under the perturbation of the class but not without: it follows what the perturbations of a class "
        "share. Right under a row's own alone: it follows what belongs to the picture, or what does not carry over by "
        "addition (a blur does not; sums are clamped). R_p lies between 0, answers spread evenly, and "
        f"{found['most_reliance']:.4f}, one answer for each class, right or wrong: read it beside the accuracy.",
    ]


def _of_dfr(found: dict[str, Any], own: dict[str, Any], how: dict[str, Any]) -> list[str]:
    made, clean = found["published"], found["clean"]
    learnt = f"{100 * made['learnt']:+.1f} points more than" if made["learnt"] > 0 else "not more than"
    rows = [
        ["victim of published rows", _percent(made["before"]), _percent(made["refitted"])],
        ["victim of clean rows", _percent(clean["before"]), _percent(clean["refitted"])],
        ["untrained network", "", _percent(made["random_trunk"])],
        ["trained on the few clean rows alone", _percent(made["from_scratch"]), ""],
    ]
    steps = made.get("refitted_step"), made.get("random_trunk_step"), clean.get("refitted_step")
    lengths = [
        f"The last layers were fitted with steps of {steps[0]} (victim of published rows), {steps[1]} (untrained "
        f"network) and {steps[2]} (victim of clean rows): a search that diverges is begun anew with half the step."
    ]
    return [
        f"With its last layer fitted anew to {made['clean_rows']:,} clean rows a victim of the published rows reaches "
        f"{_percent(made['refitted'])} on clean test rows (before: {_percent(made['before'])}), {learnt} the better of "
        f"two controls with the same clean rows alone (a victim of clean rows: {_percent(clean['refitted'])}).",
        *_table(["network", "as it is", "last layer fitted anew"], rows),
        f"The control from scratch was trained for {found['epochs_from_scratch']} epochs, about the victim's number of "
        "steps. More than both controls: the trunk has learnt something from the published rows. Not more: nothing is "
        "shown, neither that it has nor that it has not.",
        *(lengths if all(steps) else []),  # earlier versions did not keep them
    ]


def _of_recovery(found: dict[str, Any], own: dict[str, Any], how: dict[str, Any]) -> list[str]:
    made, clean = (found[name] for name in ("published", "clean"))
    rows = [["0: as it is", *(_percent(victim["before"]) for victim in (made, clean))]]
    for a, b in zip(made["points"], clean["points"], strict=True):
        reach = "any" if a["radius"] is None else f"{a['radius']:g}"
        rows.append([reach, *(f"{_percent(p['accuracy'])} (moved by {p['moved']:.2f})" for p in (a, b))])
    epochs = own["recovery_epochs"]
    paper = "" if epochs >= 60 else "; the paper trains for 60"
    near, free = made["points"][0], made["points"][-1]
    return [
        f"Trained on {found['clean_rows']:,} clean rows with its weights within L2 distance {near['radius']:g}, a "
        f"victim of the published rows reaches {_percent(near['accuracy'])} on clean test rows (before: "
        f"{_percent(made['before'])}), with no bound {_percent(free['accuracy'])}; the same clean rows alone give a "
        f"network of their own {_percent(found['from_scratch'])}.",
        *_table(["within L2 distance", "victim of published rows", "victim of clean rows"], rows),
        f"{_epochs(epochs)}{paper}; the network of its own: {_epochs(found['epochs_from_scratch'])}. What was reached "
        "is the least that weights of that ball can do; the certificate bounds them from above, under noise. Not more "
        "than the clean rows alone give: nothing is shown of what the published rows taught.",
    ]


def _of_certificate(found: dict[str, Any], own: dict[str, Any], how: dict[str, Any]) -> list[str]:
    def told(bound: float | None) -> str:
        return "abstains" if bound is None else _percent(bound)

    made, clean = (found[name]["bounds"] for name in ("published", "clean"))
    rows = [[f"{a['eta']:g}", told(a["accuracy"]), told(b["accuracy"])] for a, b in zip(made, clean, strict=True)]
    for name, title in (("unperturbed", "weights as they are"), ("median", "noise alone, median of the draws")):
        rows.append([title, *(_percent(found[victim][name]) for victim in ("published", "clean"))])
    confidence, quantile = _percent(found["confidence"]), _percent(found["quantile"])
    first = (
        f"For any one set of weights within L2 distance {rows[0][0]} of the victim's, noise of {own['sigma']:g} on all "
        f"of them leaves at most {rows[0][1]} of {found['test_rows']:,} clean test rows right, with probability "
        f"{quantile} or more (confidence {confidence}; for a victim of clean rows: {rows[0][2]})."
    )
    return [
        first if made[0]["accuracy"] is not None else f"Nothing is certified: {own['draws']:,} draws are too few.",
        *_table(["within L2 distance", "victim of published rows", "victim of clean rows"], rows),
        f"{own['draws']:,} draws; chance is {_percent(found['chance'])}. The bound is on noisy weights near this one "
        "victim, for each radius by itself: weights without noise, networks trained from elsewhere and other "
        "architectures may do better. Where the bound of the clean victim is as low, the noise has done it and not the "
        "perturbation.",
    ]


PAGES: dict[What, tuple[str, Callable[[dict[str, Any], dict[str, Any], dict[str, Any]], list[str]]]] = {
    "separability": ("Is the perturbation read off simply?", _of_separability),
    "detector": ("Does a simple network find the set out?", _of_detector),
    "samples": ("Are published rows learnt sooner than clean ones?", _of_samples),
    "supervised": ("Does a trainer who knows the method find the rows?", _of_supervised),
    "shortcuts": ("What does a victim follow?", _of_shortcuts),
    "dfr": ("What do a few clean rows bring back?", _of_dfr),
    "recovery": ("What do clean rows bring back near the victim?", _of_recovery),
    "certificate": ("What is certified near the victim?", _of_certificate),
}

"""Prototypes disabled, merged and renamed after the fit: a list of edits. Network and centroids stay as they are."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ..method.explainers import EncoderKMeans
from ..method.operator import CompositeRows
from .nearest import Nearest, appearances

if TYPE_CHECKING:
    from .explained import Explained

BATCH = 32  # images passed at a time
LONGEST = 60  # characters of a name
NOTHING: dict[str, Any] = {"shared": None, "accuracy": {}}  # is known where the images are not


@dataclass(eq=False)
class Edited(EncoderKMeans):
    """B4, B34 … with prototypes left out or counted as one.

    ``segment`` int64 [K] is the prototype that each stands for: itself, the first of those merged, or -1: disabled.
    """

    segment: torch.Tensor

    def sim(self, h: CompositeRows) -> torch.Tensor:
        """q_s of eq. 9 over the prototypes that are left, those merged by their first, [N, H', W']."""
        left = (self.segment >= 0).nonzero().flatten()
        remaining = replace(self.prototypes, vectors=self.prototypes.vectors[left])
        q_s = EncoderKMeans(remaining, self.classes, self.start_block, self.normalisation).sim(h)
        return self.segment[left].to(q_s.device)[q_s]

    def proj(self, similarity: torch.Tensor) -> torch.Tensor:
        """Eq. 10 with windows of unequal size: a class's count, averaged over the segments it has left, [N, C]."""
        labels, index = self.prototypes.labels.to(similarity.device), similarity.flatten(1)
        counts = torch.zeros(len(index), self.classes, device=index.device)
        counts.scatter_add_(1, labels[index], torch.ones_like(index, dtype=counts.dtype))
        windows = self.prototypes.labels[left_of(self.segment)].bincount(minlength=self.classes)
        return counts / windows.to(counts)


def left_of(segment: torch.Tensor) -> torch.Tensor:
    """The prototypes that stand for themselves, ascending."""
    return (segment == torch.arange(len(segment))).nonzero().flatten()


class Edits:
    """The edits of an explanation, in their order; saved and loaded with it.

        explained.edits.disable(2, 3)         # B234 without prototype 3: its cells go to the next nearest
        explained.edits.merge(2, 4, 5)        # 5 is shown and counted as 4; there is no new centroid
        explained.edits.rename(2, 4, "beak")
        explained.edits.undo()

    Maps, predictions, and what is counted from them are those of the edited explainer from then on; the table gets a
    row for it (``B234, edited``). Each returns the edits. Another K/C is a refit: ``explain()`` again.

    Attributes
    ----------
    done
        A dictionary each, plain data: ``edit``, ``start_block``, ``prototypes``, a ``name``, and what it led to.
    """

    def __init__(self, explained: "Explained") -> None:
        self._explained = explained
        self.done: list[dict[str, Any]] = []
        self._fitted: dict[int, tuple[EncoderKMeans, Nearest, torch.Tensor | None]] = {}
        self._before: list[dict[tuple[int, str], torch.Tensor]] = []  # maps before each edit that was not loaded

    def __repr__(self) -> str:
        lines = []
        for edit in self.done:
            which, name = ", ".join(map(str, edit["prototypes"])), self._explained.name(edit["start_block"])
            how = {"disable": "disabled", "merge": "merged", "rename": f"named {edit.get('name')!r}"}[edit["edit"]]
            lines.append(f"{name}: {which} {how}")
            lines[-1] += "".join(f"; {column} {value:.1f}" for column, value in edit["accuracy"].items())
        return "\n".join(lines) or "no edits"

    def disable(self, start_block: int, *prototypes: int) -> "Edits":
        """Leave prototypes out; the last one of a class is refused (ValueError)."""
        return self._do({"edit": "disable", "start_block": start_block, "prototypes": list(prototypes)})

    def merge(self, start_block: int, *prototypes: int) -> "Edits":
        """Count prototypes of one class as the first of them."""
        return self._do({"edit": "merge", "start_block": start_block, "prototypes": list(prototypes)})

    def rename(self, start_block: int, prototype: int, name: str) -> "Edits":
        """Call a prototype by a name of one's own."""
        return self._do({"edit": "rename", "start_block": start_block, "prototypes": [prototype], "name": name})

    def undo(self) -> "Edits":
        """Take the last edit back; a ValueError if there is none."""
        if not self.done:
            raise ValueError("there is no edit to undo")
        b = self.done.pop()["start_block"]
        explained = self._explained
        for key in [key for key in explained.maps if key[0] == b]:
            del explained.maps[key]  # of loaded edits: computed again when asked for
        explained.maps |= self._before.pop() if self._before else {}
        self._take(b)
        return self

    def replay(self, done: Iterable[dict[str, Any]]) -> None:
        """Take in edits saved before, with what they led to; a ValueError if one does not fit."""
        for edit in done:
            try:
                given: dict[str, Any] = {"name": str(edit["name"])} if edit["edit"] == "rename" else {}
                given |= {"edit": edit["edit"], "start_block": edit["start_block"], "prototypes": edit["prototypes"]}
                self._check(given)
                shared = None if edit["shared"] is None else [int(n) for n in edit["shared"]]
                if shared is not None and len(shared) != len(self.segment(given["start_block"])):
                    raise ValueError(f"{len(shared)} counts")
                given |= {"shared": shared, "accuracy": {str(c): float(v) for c, v in edit["accuracy"].items()}}
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise ValueError(f"a saved edit does not fit the prototypes: {error}") from None
            self.done.append(given)
            self._take(given["start_block"])

    def segment(self, start_block: int) -> torch.Tensor:
        """The prototype that each stands for, int64 [K]; -1: disabled."""
        segment = torch.arange(len(self._explained.explainers[start_block].prototypes))
        for edit in self.done:
            if edit["start_block"] == start_block and edit["edit"] != "rename":
                of_edit = torch.isin(segment, torch.tensor(edit["prototypes"]))
                segment[of_edit] = -1 if edit["edit"] == "disable" else edit["prototypes"][0]
        return segment

    def names(self, start_block: int) -> dict[int, str]:
        """Names of one's own, by prototype."""
        of_block = (edit for edit in self.done if edit["start_block"] == start_block and edit["edit"] == "rename")
        return {edit["prototypes"][0]: edit["name"] for edit in of_block}

    def fitted(self, start_block: int) -> tuple[EncoderKMeans, Nearest, torch.Tensor | None]:
        """The explainer as fitted, what was near its prototypes then, and the training images' maps, if known."""
        explained, b = self._explained, start_block
        return self._fitted.get(b) or (explained.explainers[b], explained.nearest[b], explained.maps.get((b, "train")))

    def _do(self, edit: dict[str, Any]) -> "Edits":
        self._check(edit)
        explained, b = self._explained, edit["start_block"]
        explained.fill()
        self._before.append({key: q_s for key, q_s in explained.maps.items() if key[0] == b})
        before = [e for e in self.done if e["start_block"] == b]
        led_to = {"shared": before[-1]["shared"], "accuracy": before[-1]["accuracy"]} if before else NOTHING
        self.done.append(edit | led_to)
        self._take(b)
        if edit["edit"] == "rename":
            return self
        try:
            maps = {key: self._moved(*key) for key in self._before[-1]}
        except BaseException:  # interrupted: as if it had not been asked for
            self.undo()
            raise
        explained.maps |= maps
        if (b, "train") in maps:
            labels = explained.explainers[b].prototypes.labels
            self.done[-1]["shared"] = appearances(labels, explained.labels_of("train"), maps[b, "train"]).tolist()
            self.done[-1]["accuracy"] = self._accuracies(b)
        self._take(b)
        return self

    def _accuracies(self, b: int) -> dict[str, float]:
        """For the table, so of the images that it is of; else none."""
        try:
            self._explained.needs_its_images()
        except ValueError:
            return {}
        return self._explained.accuracies(b)

    def _take(self, b: int) -> None:
        """Make the explanation what the edits done so far say of it."""
        explained, (fitted, nearest, _) = self._explained, self._fitted.setdefault(b, self.fitted(b))
        segment, of_block = self.segment(b), [edit for edit in self.done if edit["start_block"] == b]
        p, how = fitted.prototypes, (fitted.classes, b, fitted.normalisation)
        as_fitted = torch.equal(segment, torch.arange(len(segment)))
        explained.explainers[b] = fitted if as_fitted else Edited(p, *how, segment)
        shared = next((edit["shared"] for edit in reversed(of_block) if edit["shared"] is not None), None)
        explained.nearest[b] = nearest if shared is None else replace(nearest, shared=torch.tensor(shared))
        explained._seen.cache_clear()
        explained._kept.cache_clear()
        if explained.table is not None:
            row = f"{explained.name(b)}, edited"
            explained.table = explained.table.drop(index=row, errors="ignore")
            for column, value in (of_block[-1]["accuracy"] if of_block and not as_fitted else {}).items():
                explained.table.loc[row, column] = value

    def _moved(self, b: int, split: str) -> torch.Tensor:
        """The map of a split; only images with cells of a disabled prototype go through the network."""
        explained, explainer = self._explained, self._explained.explainers[b]
        q_s = self.segment(b)[explained.maps[b, split].long()]
        assert explained.dataset is not None
        images = (q_s < 0).flatten(1).any(1).nonzero().flatten()
        for index in images.split(BATCH) if len(images) else ():
            x = explained.activations(explained.dataset.split(split).pixels[index.numpy()])
            q_s[index] = explainer.sim(explainer.h(x)).cpu()
        return q_s.int()

    def _check(self, edit: dict[str, Any]) -> None:
        """One line of ValueError for what cannot be done."""
        explained, b, given = self._explained, edit["start_block"], edit["prototypes"]
        if b not in explained.explainers:
            raise ValueError(f"start_block must be one of {explained.start_blocks}, got {b!r}")
        segment, labels, name = self.segment(b), explained.explainers[b].prototypes.labels, explained.name(b)
        for k in given:
            if not isinstance(k, int) or not 0 <= k < len(segment):
                raise ValueError(f"prototypes of {name} are 0 … {len(segment) - 1}, got {k!r}")
            if segment[k] < 0:
                raise ValueError(f"prototype {k} of {name} is disabled: edits.undo() takes that back")
            if segment[k] != k:
                raise ValueError(f"prototype {k} of {name} is merged with {int(segment[k])}: name that one")
        if not given:
            raise ValueError("name at least one prototype")
        if edit["edit"] == "merge":
            if len(set(given)) < max(2, len(given)):
                raise ValueError(f"merge takes two different prototypes or more, got {given}")
            if len(labels[given].unique()) > 1:
                names = sorted({explained.classes[c] for c in labels[given].tolist()})
                raise ValueError(f"merge takes prototypes of one class, {given} are of {', '.join(names)}")
        elif edit["edit"] == "disable":
            left = left_of(segment)
            left = left[~torch.isin(left, torch.tensor(given))]
            for c in labels[given].unique().tolist():
                if not (labels[left] == c).any():
                    whose = f"the last prototype of {explained.classes[c]} in {name}"
                    raise ValueError(f"disable would leave out {whose}: fewer are a refit, explain() with a lower K/C")
        elif edit["edit"] == "rename":
            text = edit["name"]
            if not isinstance(text, str) or not 0 < len(text.strip()) <= LONGEST or not text.isprintable():
                raise ValueError(f"a name is one line of 1 to {LONGEST} characters, got {text!r}")
        else:
            raise ValueError(f"no edit {edit['edit']!r}")

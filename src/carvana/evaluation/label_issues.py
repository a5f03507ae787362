"""Masks that may be wrong: where every network contradicts them."""

import math

import cv2
import numpy as np
import pandas as pd

from carvana.inference.logits import BlendedLogits

CONFIDENCE = 0.9  # probability from which a network contradicts a mask
PATCH = 3  # network pixels a contradicted patch is wide and high at least: edges are soft, labels not wrong for that


def label_issue_pixels(least: BlendedLogits, most: BlendedLogits, true: np.ndarray) -> dict[str, float]:
    """Where every network with every tta contradicts the mask, so that the mask may be wrong.

    disputed: full-size pixels at which each gives the other class CONFIDENCE or more, in patches at least PATCH pixels
    of the smallest network wide and high; sure: mean probability there of the network that is least sure (0 where
    nothing is disputed).

    least, most: the lowest and highest logits of all networks and tta, for each size; true: (H, W) bool.
    """
    by_size = zip(least.by_size, most.by_size, strict=True)
    against = [
        np.where(true, -BlendedLogits([high]).enlarge(true.shape), BlendedLogits([low]).enlarge(true.shape))
        for low, high in by_size
    ]
    weakest = np.minimum.reduce(against)
    firm = (weakest >= math.log(CONFIDENCE / (1 - CONFIDENCE))).astype(np.uint8)
    scale = max(true.shape[0] / logits.shape[0] for logits in least.by_size)
    side = int(PATCH * scale - 1) | 1  # odd, so that it has a middle
    patches = cv2.morphologyEx(firm, cv2.MORPH_OPEN, np.ones((side, side), np.uint8)) > 0
    sure = float((1 / (1 + np.exp(-weakest[patches]))).mean()) if patches.any() else 0.0
    return {"disputed": int(np.count_nonzero(patches)), "sure": sure}


def label_issues(scores: pd.DataFrame, earlier: pd.DataFrame | None = None) -> pd.DataFrame:
    """Images whose mask every network contradicts (`label_issue_pixels`), worst first, for a person to judge.

    Columns: img, car, view, fold, dice, disputed, sure, and exclude, empty: a mark in it leaves the image out where
    the table is given as `exclude`. Marks of an `earlier` table stay, also those of images that were left out.
    """
    columns = ["img", "car", "view", "fold", "dice", "disputed", "sure"]
    issues = scores.loc[scores["disputed"] > 0, columns].assign(exclude="")
    if earlier is not None:
        marked = earlier[earlier["exclude"] != ""]
        marks = dict(zip(marked["img"], marked["exclude"], strict=True))
        issues["exclude"] = [marks.get(name, "") for name in issues["img"]]
        issues = pd.concat([issues, marked[~marked["img"].isin(issues["img"])]])
    return issues.sort_values("disputed", ascending=False, ignore_index=True)

"""Our recipe against the usual one on the same images, cores and minutes, both scored by the same code.

Usual, the defaults of github.com/milesial/Pytorch-UNet, which was written for this competition: the classic U-Net with
two classes, RMSprop with lr 1e-5 and momentum 0.999, cross-entropy + Dice, images and masks at half size (bicubic and
nearest), batch 1, float32, nothing augmented; masks by enlarged logits and argmax, for as long as ours took. Ours:
profiles/cpu.yaml, its encoder from ImageNet; the number of its steps was computed from the measured time of a step, so
the real minutes differ from those asked for. Both learn from all folds but 0 of 2, and are scored on every second
image of fold 0, at the images' own size, without tta.

.venv/bin/python bench/usual.py --data ../carvana512 --encoder-weights lite0.safetensors --minutes 20
"""

import argparse
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from common import RESULTS, machine, recipe_of, tame_allocator, write
from recipe import step_costs, train_for
from torch import nn
from torch.nn import functional as F

from carvana.classic_unet import ClassicUNet
from carvana.data import Competition
from carvana.data.folds import make_folds
from carvana.data.images import Archive, mask_of, read_full_image
from carvana.files import write_text
from carvana.metrics import dice, mean_over_cars, pixel_counts, score_over_cars


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder-weights", default="")
    parser.add_argument("--profile", default="profiles/cpu.yaml")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"))
    options = parser.parse_args()
    tame_allocator()
    competition = Competition(options.data)
    fold_of = competition.samples["car"].map(make_folds(competition.samples, 2, 0, 1).set_index("car")["fold"])
    learnt, scored = competition.samples[fold_of != 0], competition.samples[fold_of == 0][::2]

    recipe = recipe_of(options.profile, encoder_weights=options.encoder_weights, validate_every=100_000, epochs=1000)
    steps = max(1, round(60 * options.minutes / step_costs({"ours": recipe})["ours"]))
    ours = train_for(recipe, options.data, options.folder / "ours", steps)
    ours = {"steps": steps, "images": steps * recipe.batch_size, **ours}

    net = usual_network()
    began = time.monotonic()
    steps = train_usual(net, competition.train_images, learnt, ours["seconds"])
    usual = {"steps": steps, "images": steps, "seconds": time.monotonic() - began}
    usual |= {"dice": usual_dices(net, competition.train_images, scored), "cars": scored["car"].tolist()}

    write("usual", {"usual": usual, "ours": ours})
    write_text(RESULTS / "usual.md", page({"usual": usual, "ours": ours}))


def page(arms: dict[str, dict]) -> str:
    """The table of both, and what ours has more."""
    lines = ["| way | minutes | images seen | Dice | 95 % interval |", "|---" * 5 + "|"]
    for name, arm in arms.items():
        mean, low, high = score_over_cars(arm["dice"], arm["cars"])
        cells = name, f"{arm['seconds'] / 60:.1f}", str(arm["images"]), f"{mean:.6f}", f"{low:.6f} to {high:.6f}"
        lines.append(f"| {' | '.join(cells)} |")
    gain, low, high = mean_over_cars(np.array(arms["ours"]["dice"]) - arms["usual"]["dice"], arms["usual"]["cars"])
    more = f"Ours has {gain:+.6f} more ({low:+.6f} to {high:+.6f}, paired over cars)."
    return f"# The usual way and ours\n\n{__doc__}\nMachine: {machine()}.\n\n" + "\n".join([*lines, "", more, ""])


def usual_network() -> nn.Module:
    """The classic U-Net with an output for each of two classes."""
    torch.manual_seed(0)
    net = ClassicUNet()
    net.head = nn.Conv2d(net.head.in_channels, 2, 1)
    return net


def half_image(images: Archive, name: str) -> torch.Tensor:
    """(1, 3, H / 2, W / 2) float32 in [0, 1]."""
    image = read_full_image(images, name)
    half = cv2.resize(image, (image.shape[1] // 2, image.shape[0] // 2), interpolation=cv2.INTER_CUBIC)
    return torch.from_numpy(half).permute(2, 0, 1)[None].float() / 255


def train_usual(net: nn.Module, images: Archive, samples: pd.DataFrame, seconds: float) -> int:
    """Learn for so long, an image a step; returns the steps."""
    optimizer = torch.optim.RMSprop(net.parameters(), lr=1e-5, weight_decay=1e-8, momentum=0.999)
    order, ends, steps = np.random.default_rng(0), time.monotonic() + seconds, 0
    while True:
        for row in order.permutation(len(samples)):
            if time.monotonic() > ends:
                return steps
            sample = samples.iloc[row]
            mask = mask_of(sample).astype(np.uint8)
            half = cv2.resize(mask, (mask.shape[1] // 2, mask.shape[0] // 2), interpolation=cv2.INTER_NEAREST)
            logits, target = net.train()(half_image(images, sample.img)), torch.from_numpy(half)[None].long()
            shares, wanted = logits.softmax(1), F.one_hot(target, 2).permute(0, 3, 1, 2)
            both, total = (shares * wanted).sum((2, 3)), (shares + wanted).sum((2, 3))
            loss = F.cross_entropy(logits, target) + 1 - (2 * both / total.clamp(1e-6)).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            steps += 1


@torch.inference_mode()
def usual_dices(net: nn.Module, images: Archive, samples: pd.DataFrame) -> list[float]:
    """Dice at full size of every sample."""
    dices = []
    for sample in samples.itertuples():
        logits = net.eval()(half_image(images, sample.img))
        predicted = F.interpolate(logits, (sample.height, sample.width), mode="bilinear").argmax(1)[0].numpy() == 1
        dices.append(round(float(dice(pixel_counts(predicted, mask_of(sample)))), 6))
    return dices


if __name__ == "__main__":
    main()

"""Pre-train the bundled ViT backbone on invented glyphs.

Every image is drawn by this file: a few hundred glyph classes, each a fixed random set of strokes
(lines, corners, Bezier curves, arcs, blobs), rendered with random affine maps, bends, thickness,
contrast, polarity, blur and noise, often at 8x8 and scaled back up.  No data set, font or digit is
read.  The network learns to tell the glyph classes apart and to say how each one looks undistorted;
the heads are then dropped and the encoder is saved in Hugging Face format.

    python scripts/pretrain_backbone.py --out fedsplit/assets/vit-glyphs
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn
from torch.nn import functional
from transformers import ViTConfig, ViTModel

IMAGE_SIZE = 32
STROKES = 3
POINTS_PER_STROKE = 24
# A point this far outside the canvas paints nothing: used to pad glyphs with fewer strokes.
FAR_AWAY = 1e3

Points = NDArray[np.float64]


# --------------------------------------------------------------------------- glyph classes


@dataclass(frozen=True)
class GlyphBank:
    """The invented classes: stroke points and relative pen widths, one row for each class."""

    points: Tensor  # (classes, STROKES, POINTS_PER_STROKE, 2), inside [-1, 1]
    widths: Tensor  # (classes, STROKES, POINTS_PER_STROKE), about 1
    present: Tensor  # (classes, STROKES), False for padding

    def __len__(self) -> int:
        return int(self.points.shape[0])


def _polyline(corners: Points) -> Points:
    """Resample a polyline to a fixed number of evenly spaced points."""
    lengths = np.linalg.norm(np.diff(corners, axis=0), axis=1)
    at = np.concatenate([[0.0], np.cumsum(lengths)])
    wanted = np.linspace(0.0, at[-1], POINTS_PER_STROKE)
    return np.stack([np.interp(wanted, at, corners[:, axis]) for axis in range(2)], axis=1)


def _bezier(control: Points) -> Points:
    """A cubic Bezier curve through four control points, evenly spaced along its length."""
    t = np.linspace(0.0, 1.0, 4 * POINTS_PER_STROKE)[:, None]
    basis = np.concatenate([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], axis=1)
    return _polyline(basis @ control)


def _arc(rng: np.random.Generator) -> Points:
    """Part of an ellipse, often a closed one: loops are what plain curves do not give."""
    sweep = 2 * math.pi if rng.random() < 0.4 else rng.uniform(0.7, 1.8) * math.pi
    angle = rng.uniform(0, 2 * math.pi) + np.linspace(0.0, sweep, 4 * POINTS_PER_STROKE)
    radius = rng.uniform(0.25, 0.8, size=2)
    return _polyline(radius * np.stack([np.cos(angle), np.sin(angle)], axis=1))


def _random_stroke(rng: np.random.Generator) -> tuple[Points, float]:
    """One stroke and its relative pen width."""
    kind = rng.choice(["line", "corner", "bezier", "arc", "blob"], p=[0.2, 0.15, 0.3, 0.28, 0.07])
    if kind == "bezier":
        return _bezier(rng.uniform(-1.3, 1.3, size=(4, 2))), 1.0
    if kind == "arc":
        return _arc(rng) + rng.uniform(-0.3, 0.3, size=2), 1.0
    if kind == "blob":
        centre = rng.uniform(-0.8, 0.8, size=2)
        return _polyline(centre + rng.uniform(-0.15, 0.15, size=(2, 2))), 2.0
    corners = 2 if kind == "line" else 3
    return _polyline(rng.uniform(-1.0, 1.0, size=(corners, 2))), 1.0


def _random_glyph(rng: np.random.Generator) -> tuple[Points, Points, NDArray[np.bool_]]:
    """Points, widths and presence of one glyph class, scaled to fill [-1, 1]."""
    points = np.zeros((STROKES, POINTS_PER_STROKE, 2))
    widths = np.ones((STROKES, POINTS_PER_STROKE))
    count = int(rng.choice([1, 2, 3], p=[0.15, 0.5, 0.35]))
    for index in range(count):
        stroke, width = _random_stroke(rng)
        if index and rng.random() < 0.6:
            # Written signs are mostly connected: start this stroke somewhere on the last one.
            stroke = stroke + points[index - 1, rng.integers(POINTS_PER_STROKE)] - stroke[0]
        points[index], widths[index] = stroke, width
    used = points[:count].reshape(-1, 2)
    low, high = used.min(axis=0), used.max(axis=0)
    span = np.maximum(high - low, 0.35 * (high - low).max())
    points = 2 * (points - (low + high) / 2) / np.maximum(span, 1e-3)
    return points, widths, np.arange(STROKES) < count


def make_bank(classes: int, seed: int) -> GlyphBank:
    """Invent the glyph classes; the same seed always gives the same ones."""
    glyphs = [_random_glyph(np.random.default_rng([seed, index])) for index in range(classes)]
    points, widths, present = (np.stack(part) for part in zip(*glyphs, strict=True))
    return GlyphBank(
        torch.from_numpy(points).float(),
        torch.from_numpy(widths).float(),
        torch.from_numpy(present),
    )


# --------------------------------------------------------------------------- drawing


def _uniform(shape: tuple[int, ...], low: float, high: float, rng: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=rng)


def _bend(points: Tensor, strength: float, rng: torch.Generator) -> Tensor:
    """Move the points along a smooth random field: cheaper than warping finished images."""
    batch = points.shape[0]
    waves = 3
    direction = _uniform((batch, waves, 2), -2.2, 2.2, rng)
    phase = _uniform((batch, waves, 1), 0.0, 2 * math.pi, rng)
    amplitude = 0.08 * strength * torch.randn((batch, waves, 2), generator=rng)
    angle = torch.einsum("bwc,bpc->bwp", direction, points) + phase
    return points + torch.einsum("bwp,bwc->bpc", torch.sin(angle), amplitude)


def _affine(batch: int, strength: float, rng: torch.Generator) -> Tensor:
    """Random rotation, shear and unequal scaling as (batch, 2, 2) matrices."""
    angle = strength * _uniform((batch,), -0.35, 0.35, rng)
    shear = strength * _uniform((batch,), -0.35, 0.35, rng)
    cos, sin = torch.cos(angle), torch.sin(angle)
    turn = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    one, zero = torch.ones_like(shear), torch.zeros_like(shear)
    slant = torch.stack([torch.stack([one, shear], 1), torch.stack([zero, one], 1)], 1)
    return turn @ slant @ torch.diag_embed(1 + strength * _uniform((batch, 2), -0.25, 0.1, rng))


def _place(points: Tensor, present: Tensor, strength: float, rng: torch.Generator) -> Tensor:
    """Fit each glyph into a randomly sized box at a random position inside the canvas."""
    hidden = ~present[:, :, None]
    high = points.masked_fill(hidden, -FAR_AWAY).amax(dim=1)
    low = points.masked_fill(hidden, FAR_AWAY).amin(dim=1)
    half = ((high - low) / 2).amax(dim=1, keepdim=True).clamp_min(1e-3)
    size = 0.92 - strength * _uniform((points.shape[0], 1), 0.0, 0.37, rng)
    shift = (1 - size) * _uniform((points.shape[0], 2), -0.6, 0.6, rng)
    centred = (points - ((high + low) / 2)[:, None]) / half[:, None]
    return (centred * size[:, None] + shift[:, None]).masked_fill(hidden, FAR_AWAY)


def _paint(points: Tensor, pen: Tensor, edge: Tensor) -> Tensor:
    """Ink in [0, 1] at each pixel, from its distance to the nearest pen position."""
    grid = (torch.arange(IMAGE_SIZE) + 0.5) * (2 / IMAGE_SIZE) - 1
    across = (grid[None, :, None] - points[:, None, :, 0]).square()
    down = (grid[None, :, None] - points[:, None, :, 1]).square()
    # Squared distances over the pen's square compare pen widths without a root for each point.
    scale = pen.square().reciprocal()[:, None]
    ratio = ((across * scale)[:, None] + (down * scale)[:, :, None]).amin(dim=3).sqrt()
    return torch.sigmoid((1 - ratio) * edge)


def plain_pictures(bank: GlyphBank, side: int = 16) -> Tensor:
    """One undistorted small picture of each class, as rows with zero mean and unit spread."""
    visible = bank.present[:, :, None, None]
    points = (0.8 * bank.points).masked_fill(~visible, FAR_AWAY).flatten(1, 2)
    ink = _paint(points, 0.15 * bank.widths.flatten(1), torch.tensor(5.0))
    pictures = functional.avg_pool2d(ink[:, None], IMAGE_SIZE // side).flatten(1)
    return (pictures - pictures.mean(dim=0)) / pictures.std()


def _coarsen(ink: Tensor, rng: torch.Generator) -> Tensor:
    """Redraw most images from an 8x8 or 16x16 version, as scans of small signs look."""
    choice = torch.rand(ink.shape[0], generator=rng)
    result = ink.clone()
    modes = (
        (8, "bilinear", 0.00, 0.35),
        (8, "bicubic", 0.35, 0.45),
        (8, "nearest", 0.45, 0.55),
        (16, "bilinear", 0.55, 0.70),
    )
    for side, mode, start, stop in modes:
        picked = (choice >= start) & (choice < stop)
        small = functional.avg_pool2d(ink[picked, None], IMAGE_SIZE // side)
        big = functional.interpolate(small, size=(IMAGE_SIZE, IMAGE_SIZE), mode=mode)
        result[picked] = big[:, 0]
    return result


def _tone(ink: Tensor, strength: float, rng: torch.Generator) -> Tensor:
    """Random contrast, polarity and noise; the result is normalised like the model's input."""
    batch = ink.shape[0]
    paper = 0.25 * _uniform((batch, 1, 1), 0.0, 1.0, rng).square()
    image = paper + ink * (_uniform((batch, 1, 1), 0.65, 1.0, rng) - paper)
    inverted = torch.rand((batch, 1, 1), generator=rng) < 0.15 * strength
    image = torch.where(inverted, 1 - image, image)
    noise = strength * _uniform((batch, 1, 1), 0.0, 0.1, rng)
    image = image + noise * torch.randn(image.shape, generator=rng)
    return (image.clamp(0, 1) - 0.5) / 0.5


def draw_batch(
    bank: GlyphBank, batch: int, strength: float, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw `batch` images of random classes: pixels (batch, 3, 32, 32) and class labels.

    `strength` scales every distortion: 0 draws the plain glyphs, 1 the hardest images.
    """
    labels = torch.randint(len(bank), (batch,), generator=rng)
    strokes = bank.points[labels]
    # Strokes shift a little against each other, as no two drawings of a sign agree exactly.
    strokes = strokes + 0.08 * strength * torch.randn((batch, STROKES, 1, 2), generator=rng)
    present = bank.present[labels, :, None].expand(strokes.shape[:3]).reshape(batch, -1)
    points = _bend(strokes.reshape(batch, -1, 2), strength, rng)
    points = points @ _affine(batch, strength, rng).transpose(1, 2)
    points = _place(points, present, strength, rng)
    pen = _uniform((batch, 1), 0.07, 0.24, rng) * bank.widths[labels].flatten(1)
    ink = _paint(points, pen, _uniform((batch, 1, 1), 2.5, 9.0, rng))
    image = _tone(_coarsen(ink, rng), strength, rng)
    return image[:, None].expand(-1, 3, -1, -1).contiguous(), labels


# --------------------------------------------------------------------------- model and training


def backbone_config() -> ViTConfig:
    """The bundled architecture: 17 tokens, 1.2 million weights, no dropout."""
    return ViTConfig(
        image_size=IMAGE_SIZE,
        patch_size=8,
        num_channels=3,
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=512,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.08,
    )


def _learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 5 %, then a cosine down to nearly zero."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) + 1e-6


def _strength(step: int, steps: int) -> float:
    """How hard the images are: plain glyphs first, else the network is slow to start learning."""
    return min(1.0, 0.1 + 0.9 * step / max(1, 0.5 * steps))


def _optimizer(modules: nn.Module) -> torch.optim.AdamW:
    """AdamW that decays matrices only: biases and layer norms are better left alone."""
    matrices = [p for p in modules.parameters() if p.ndim >= 2]
    vectors = [p for p in modules.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98))


class GlyphHeads(nn.Module):
    """Both training targets: the class, and the class's plain picture.

    The picture tells similar classes apart from different ones, which a class number does not;
    it speeds up learning at the start.
    """

    def __init__(self, width: int, bank: GlyphBank, picture_weight: float = 5.0) -> None:
        super().__init__()
        self.pictures = plain_pictures(bank)
        self.picture_weight = picture_weight
        self.classify = nn.Linear(width, len(bank))
        self.redraw = nn.Linear(width, self.pictures.shape[1])

    def forward(self, features: Tensor, labels: Tensor) -> tuple[Tensor, float]:
        """The training loss and the share of correctly named classes."""
        logits = self.classify(features)
        named = functional.cross_entropy(logits, labels, label_smoothing=0.05)
        redrawn = functional.mse_loss(self.redraw(features), self.pictures[labels])
        hits = (logits.argmax(dim=1) == labels).float().mean().item()
        return named + self.picture_weight * redrawn, hits


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("[bold]pre-training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        refresh_per_second=2,
    )


def train(model: ViTModel, bank: GlyphBank, args: argparse.Namespace, console: Console) -> float:
    """Train `model` in place on glyphs; return the late training accuracy."""
    heads = GlyphHeads(model.config.hidden_size, bank)
    everything = nn.ModuleList([model, heads]).train()
    optimizer = _optimizer(everything)
    rng = torch.Generator().manual_seed(args.seed + 1)
    accuracy = 0.0
    with _progress(console) as progress:
        task = progress.add_task("", total=args.steps, note="")
        for step in range(args.steps):
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(step, args.steps, args.lr)
            strength = _strength(step, args.steps)
            pixels, labels = draw_batch(bank, args.batch_size, strength, rng)
            loss, hits = heads(model(pixel_values=pixels).last_hidden_state[:, 0], labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(everything.parameters(), 1.0)
            optimizer.step()
            # Every image is new, so a running training accuracy is an honest test accuracy.
            accuracy = hits if step == 0 else 0.97 * accuracy + 0.03 * hits
            note = f"loss {loss.item():.3f}  accuracy {accuracy:.3f}"
            progress.update(task, advance=1, note=note)
            if (step + 1) % 200 == 0:
                progress.console.print(f"step {step + 1}: {note}")
    return accuracy


def save(model: ViTModel, out: Path) -> None:
    """Write the encoder and the preprocessing it expects; the model card is kept by hand."""
    model.eval().float().save_pretrained(out, safe_serialization=True)
    preprocessor = {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5] * 3,
        "image_processor_type": "ViTImageProcessor",
        "image_std": [0.5] * 3,
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    }
    (out / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pre-train the bundled ViT on invented glyphs.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--classes", type=int, default=400, help="number of invented glyphs")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads torch may use")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    console = Console()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    bank = make_bank(args.classes, args.seed)
    model = ViTModel(backbone_config(), add_pooling_layer=False)
    begun = time.monotonic()
    accuracy = train(model, bank, args, console)
    save(model, args.out)
    minutes = (time.monotonic() - begun) / 60
    console.print(f"glyph accuracy {accuracy:.3f} over {len(bank)} classes, {minutes:.1f} minutes")
    console.print(f"saved to {args.out}")


if __name__ == "__main__":
    main()

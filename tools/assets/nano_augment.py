"""Augmentation against drawing styles: what the clients' vendors do differently, and more, at random.

Geometry (flip, turn, scale, shift), colour (hue, saturation, contrast, brightness, posterising, grey), line (a 3x3
maximum thins or removes dark outlines, a minimum thickens them, a mean blurs), holes, and pictures of one concept
blended across styles. All draws come from the generator that is passed in.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)
_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]], np.float32)
_RGB = np.linalg.inv(_YIQ).astype(np.float32)


def normalize(pixels: np.ndarray) -> np.ndarray:
    """uint8 [B, H, W, 3] -> float32 as the processor gives it (images are 64x64 already)."""
    return (pixels.astype(np.float32) / 255 - MEAN) / STD


def augment(rng: np.random.Generator, pixels: np.ndarray, strength: float = 1.0) -> np.ndarray:
    """uint8 [B, H, W, 3] -> float32 [B, H, W, 3], normalised; ``strength`` scales how far every draw may go."""
    moved = np.stack([_move(rng, image, strength) for image in pixels]).astype(np.float32) / 255
    moved = _filter(rng, moved, strength)
    moved = _recolour(rng, moved, strength)
    return ((_cut(rng, moved, strength) - MEAN) / STD).astype(np.float32)


def _move(rng: np.random.Generator, image: np.ndarray, strength: float) -> np.ndarray:
    side = image.shape[0]
    angle = np.deg2rad(rng.uniform(-15, 15) * strength)
    scale = np.exp(rng.uniform(-0.25, 0.25) * strength)
    stretch = np.exp(rng.uniform(-0.12, 0.12) * strength)
    flip = -1 if rng.random() < 0.5 else 1
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    matrix = np.array([[cos * stretch * flip, sin], [-sin * flip, cos / stretch]])
    centre = np.full(2, side / 2)
    offset = centre - matrix @ (centre + rng.uniform(-6, 6, 2) * strength)
    data = (*matrix[0], offset[0], *matrix[1], offset[1])
    how = {"resample": Image.Resampling.BILINEAR, "fillcolor": (255, 255, 255)}
    return np.asarray(Image.fromarray(image).transform((side, side), Image.Transform.AFFINE, data, **how))


def _neighbours(images: np.ndarray) -> np.ndarray:
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    height, width = images.shape[1:3]
    return np.stack([padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)])


def _filter(rng: np.random.Generator, images: np.ndarray, strength: float) -> np.ndarray:
    choice = rng.random(len(images)) / max(strength, 1e-6)
    for low, high, reduce in ((0.0, 0.15, np.max), (0.15, 0.27, np.min), (0.27, 0.4, np.mean)):
        chosen = (choice >= low) & (choice < high)
        if chosen.any():
            weight = rng.uniform(0.3, 1, (int(chosen.sum()), 1, 1, 1)).astype(np.float32)
            images[chosen] += weight * (reduce(_neighbours(images[chosen]), axis=0) - images[chosen])
    return images


def _recolour(rng: np.random.Generator, images: np.ndarray, strength: float) -> np.ndarray:
    count = len(images)
    hue = rng.normal(0, 0.35, count) * strength
    hue = np.where(rng.random(count) < 0.15 * strength, rng.uniform(-np.pi, np.pi, count), hue)
    saturation = np.exp(rng.normal(0, 0.3, count) * strength)
    saturation = np.where(rng.random(count) < 0.08 * strength, 0, saturation)
    turn = np.zeros((count, 3, 3), np.float32)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = saturation * np.cos(hue)
    turn[:, 1, 2], turn[:, 2, 1] = -saturation * np.sin(hue), saturation * np.sin(hue)
    matrix = _RGB @ turn @ _YIQ
    images = np.einsum("bhwc,bdc->bhwd", images, matrix, optimize=True)
    contrast = np.exp(rng.normal(0, 0.2, (count, 1, 1, 1)) * strength)
    light = rng.normal(0, 0.08, (count, 1, 1, 1)) * strength
    images = np.clip((images - 1) * contrast + 1 + np.minimum(light, 0.05), 0, 1)  # white stays nearly white
    gamma = np.exp(rng.normal(0, 0.25, (count, 1, 1, 1)) * strength)
    images = images**gamma
    poster = rng.random(count) < 0.1 * strength
    if poster.any():
        levels = rng.integers(3, 7, (int(poster.sum()), 1, 1, 1))
        images[poster] = np.round(images[poster] * levels) / levels
    return images.astype(np.float32)


def _cut(rng: np.random.Generator, images: np.ndarray, strength: float) -> np.ndarray:
    side = images.shape[1]
    for image in images:
        if rng.random() < 0.4 * strength:
            height, width = rng.integers(8, 26, 2)
            top, left = rng.integers(0, side - height), rng.integers(0, side - width)
            image[top : top + height, left : left + width] = 1 if rng.random() < 0.5 else rng.random(3)
    return images


def blend_styles(rng: np.random.Generator, pixels: np.ndarray, rows: np.ndarray, peers: list[np.ndarray]) -> np.ndarray:
    """The pictures of ``rows``; three in ten blended with the same concept in another style."""
    images = pixels[rows].copy()
    for place, row in enumerate(rows):
        if len(peers[row]) > 1 and rng.random() < 0.3:
            weight = rng.random()
            other = pixels[rng.choice(peers[row])]
            images[place] = (weight * images[place] + (1 - weight) * other).astype(np.uint8)
    return images


def mix_pairs(rng: np.random.Generator, images: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray, float]:
    """A share of the batches: mixup, or a pasted rectangle (CutMix). Returns images, partner rows and own weight."""
    order = rng.permutation(len(images))
    draw = rng.random()
    if draw >= share:
        return images, order, 1.0
    weight = float(rng.beta(0.6, 0.6))
    if draw < share / 2:
        return (weight * images + (1 - weight) * images[order]).astype(np.float32), order, weight
    side = images.shape[1]
    cut = int(side * np.sqrt(1 - weight))
    top, left = rng.integers(0, side - cut + 1, 2)
    images = images.copy()
    images[:, top : top + cut, left : left + cut] = images[order][:, top : top + cut, left : left + cut]
    return images, order, 1 - (cut / side) ** 2

"""Florence-2 (arXiv 2311.06242): model, weights and processor."""

"""Pure tensor functions: tensors in, tensors out, no state. Losses, ramps, uncertainty, noise, distances,
cubes, ambiguity, pseudo-labels and their confidence, reliability of masks."""

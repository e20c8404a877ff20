"""Pure tensor functions: tensors in, tensors out, no state. Losses, ramps, uncertainty, noise."""

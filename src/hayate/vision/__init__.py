"""Pictures in: image files to patches of pixels, and their place in the prompt."""

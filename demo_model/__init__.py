"""A small text-to-image model that anyone can train: pictures drawn by code, the training, and the
trained weights."""

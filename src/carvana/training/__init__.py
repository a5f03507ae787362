"""From images and folds to checkpoints."""

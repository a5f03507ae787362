"""What checkpoints are worth on images they have not seen."""

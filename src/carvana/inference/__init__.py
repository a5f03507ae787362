"""From checkpoints to logits and run lengths."""

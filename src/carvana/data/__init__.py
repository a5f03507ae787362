"""Images, masks, folds and what is read from them."""

"""From a data set to batches of tokens: documents, windows, packing, held-out shares."""

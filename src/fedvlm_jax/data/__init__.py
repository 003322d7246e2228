"""Tables, images, partitions and splits, tokens and batches: from files to what a round reads."""

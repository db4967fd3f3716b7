"""From shards and corpora to the batches of a training."""

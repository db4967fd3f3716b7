"""From recordings and texts to a prepared corpus: readers, checks, quality, second transcripts."""

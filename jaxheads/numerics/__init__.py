"""Floor 0: arrays to arrays. Nothing here knows what a head is."""

"""Floor 3: what is done with a head, as functions over the contract. A head with heads inside is walked as a tree."""

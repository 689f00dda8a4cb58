"""Floor 3: the operations on a head, as functions over the contract. A head with heads inside is walked as a tree."""

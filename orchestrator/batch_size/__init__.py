"""How large a batch pays: the gradient noise scale and what follows from it."""

"""How a frozen network is changed. Mechanisms know sites and tensors, never methods."""

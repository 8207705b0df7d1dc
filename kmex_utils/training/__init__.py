"""Training: the paper's CNN by KMEx's recipe, and its baseline ProtoPNet by its authors'."""

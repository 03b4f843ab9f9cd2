"""The paper's experiments on a tower: frozen features of a split, probes on them."""

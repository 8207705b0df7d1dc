"""How good an explanation is: its fidelity to parts, its faithfulness to the network, how sure it is."""

"""How much each layer suffers from each cache format, and which formats to give to whom."""

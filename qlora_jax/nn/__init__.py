"""Building blocks of the models: linears with adapters, norms, rotary positions, attention, layers of a stack."""

"""What a step costs: time, memory and bytes of each optimizer on the tensors of known models."""

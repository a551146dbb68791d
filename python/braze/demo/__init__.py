"""The demonstration: one network trained with torch.optim and a copy with braze.optim."""

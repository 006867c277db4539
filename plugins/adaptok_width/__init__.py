"""DyDiT: heads and channels by the timestep, tokens that skip the MLP."""

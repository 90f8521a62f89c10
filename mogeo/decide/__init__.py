"""From Gram matrix and losses to the weights of a step, on the host or on the device. Must not know the optimizer."""

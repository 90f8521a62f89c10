"""Where gradients are caught and kept, on one rank or many. Must not know weightings or decisions."""

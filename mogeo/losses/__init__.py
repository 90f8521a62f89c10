"""What a user hands to `backward`: named losses, and their graphs. Must not know gradients, weightings or decisions."""

"""What a user hands to `backward`: named losses, their graphs, and calls not yet stepped on. Knows no gradients, no decisions."""

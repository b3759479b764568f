"""From a batch to its gradient: screen, decide, gather, differentiate, and count what ran. Read `backward` first."""

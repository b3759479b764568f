"""Many processes: who holds which rows, what they add up, and in what order they call their collectives."""

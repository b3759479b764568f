"""Other people's trainers, gated: each an optional extra, imported only when asked for."""

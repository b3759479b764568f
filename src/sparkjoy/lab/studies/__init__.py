"""One claim of the papers each: `run(config)` measures it, `plot(records)` draws it."""

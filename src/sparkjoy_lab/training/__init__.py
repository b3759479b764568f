"""A resumable training loop over the tasks, and its records on disk."""

"""Small policies for the tasks."""

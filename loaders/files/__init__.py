"""Weight files in every container: their readers and writers."""
